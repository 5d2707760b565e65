"""Qwen-VL models after 2.5: multimodal rope, images and videos of any size."""

from __future__ import annotations

from typing import Any

from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen4ExpConfig,
    Qwen4ExpForConditionalGeneration,
)

from vlmrewrite.testing.models.tiny import (
    END,
    HIDDEN,
    IMAGE,
    SPECIAL,
    START,
    VIDEO,
    TinyVLM,
    decoder_sizes,
    patches,
    tiny_model,
)

GRIDS = [(1, 4, 4), (1, 4, 8), (1, 6, 8), (1, 6, 4)]
"""Patches of an image, of which the tower merges four to a token."""

CLIPS = [(2, 4, 4), (3, 4, 4), (2, 6, 4)]
"""Patches of a video, two frames to a step of time."""

IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}

Grid = tuple[int, int, int]


def image_ids(grid: Grid) -> list[int]:
    """An image between its markers."""
    return [START, *[IMAGE] * (grid[0] * grid[1] * grid[2] // 4), END]


def video_ids(grid: Grid) -> list[int]:
    """A video between its markers, its steps of time one after the other."""
    return [START, *[VIDEO] * (grid[0] * grid[1] * grid[2] // 4), END]


def stamped_ids(grid: Grid) -> list[int]:
    """A video as steps of time, each between markers and behind the two tokens that say when it is."""
    return [t for step in range(grid[0]) for t in (SPECIAL + step, SPECIAL + 9, *video_ids((1, *grid[1:])))]


def media(stamped: bool = True, size: int = 4) -> dict[str, Any]:
    """Images and videos in patches of two frames of ``size`` times ``size`` pixels, and what marks their tokens."""
    shape = [3 * 2 * size * size]
    clips = patches(CLIPS, shape, stamped_ids if stamped else video_ids, ("pixel_values_videos", "video_grid_thw"))
    return {
        "pictures": patches(GRIDS, shape, image_ids),
        "clips": clips,
        "video_token_id": VIDEO,
        "token_types": "mm_token_type_ids",
    }


def tower(depth: int = 1, **more: Any) -> dict[str, Any]:
    """Arguments of the configuration of a vision tower with learned positions on a grid of 8 times 8."""
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
    }
    return {"depth": depth, "patch_size": 4, "num_position_embeddings": 64, **sizes, **more}


def rope(*section: int, **more: Any) -> dict[str, Any]:
    """Parameters of multimodal rope."""
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section), **more}


def qwen2_vl(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Qwen2-VL: 4 to 12 tokens an image, multimodal rope whose time steps advance within a video, no timestamps."""
    config = Qwen2VLConfig(
        vision_config={"depth": 1, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 4},
        text_config=decoder_sizes(layers, rope_parameters=rope(2, 1, 1)),
        **IDS,
    )
    return tiny_model("qwen2_vl", Qwen2VLForConditionalGeneration, config, seed=seed, **media(stamped=False))


def qwen3_vl(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Qwen3-VL: DeepStack adds features of the tower after the first three layers; each video step has a timestamp."""
    text: dict[str, Any] = decoder_sizes(layers, head_dim=8, rope_parameters=rope(2, 1, 1, mrope_interleaved=True))
    config = Qwen3VLConfig(vision_config=tower(4, deepstack_visual_indexes=[0, 1, 2]), text_config=text, **IDS)
    return tiny_model("qwen3_vl", Qwen3VLForConditionalGeneration, config, seed=seed, **media())


def qwen3_vl_moe(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Qwen3-VL with DeepStack and two of four experts a token."""
    text: dict[str, Any] = decoder_sizes(
        layers, head_dim=8, rope_parameters=rope(2, 1, 1, mrope_interleaved=True), **EXPERTS
    )
    config = Qwen3VLMoeConfig(vision_config=tower(4, deepstack_visual_indexes=[0, 1, 2]), text_config=text, **IDS)
    return tiny_model("qwen3_vl_moe", Qwen3VLMoeForConditionalGeneration, config, seed=seed, **media())


def hybrid(layers: int, **more: Any) -> dict[str, Any]:
    """Arguments of a decoder whose layers are three of gated linear attention, then one of full attention.

    The last layer is one of full attention at any depth, for caches count tokens there.
    """
    kinds = ["full_attention" if i % 4 == 3 or i == layers - 1 else "linear_attention" for i in range(layers)]
    rotary: dict[str, Any] = rope(2, 1, 1, mrope_interleaved=True, partial_rotary_factor=0.5)
    sizes: dict[str, Any] = {"linear_key_head_dim": 32, "linear_value_head_dim": 8, "linear_num_key_heads": 2}
    heads = {"head_dim": 16, "linear_num_value_heads": 4, "layer_types": kinds}
    return decoder_sizes(layers, rope_parameters=rotary, **heads, **sizes, **more)


def qwen3_5(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Qwen3.5: three layers of gated linear attention with a convolution to one of gated full attention."""
    config = Qwen3_5Config(vision_config=tower(), text_config=hybrid(layers), **IDS)
    return tiny_model("qwen3_5", Qwen3_5ForConditionalGeneration, config, seed=seed, slow="A_log", **media())


def qwen3_5_moe(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Qwen3.5 with linear attention, two of four experts a token and one that all share."""
    text: dict[str, Any] = hybrid(layers, shared_expert_intermediate_size=HIDDEN, **EXPERTS)
    config = Qwen3_5MoeConfig(vision_config=tower(), text_config=text, **IDS)
    return tiny_model("qwen3_5_moe", Qwen3_5MoeForConditionalGeneration, config, seed=seed, slow="A_log", **media())


def qwen4_exp(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Qwen4-Exp: Qwen3.5 with four residual streams, an indexer of keys, and hashed n-grams of token ids."""
    rare: dict[str, Any] = {
        "ple_layer_ids": [i for i in (1, 2) if i < layers],
        "heads_per_ngram": 2,
        "ngram_vocab_size_base": 50,
        "eos_token_id": END,
    }
    streams: dict[str, Any] = {
        "hc_count": 4,
        "hc_lowrank": 8,
        "make_ngram_vocab_size_divisible_by": 8,
        "split_ngram_parts": 1,
    }
    indexer: dict[str, Any] = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
    blocks: dict[str, Any] = {
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "shared_expert_intermediate_size": HIDDEN,
    }
    text: dict[str, Any] = hybrid(layers, **EXPERTS, **streams, **indexer, **blocks) | rare
    del text["intermediate_size"]
    config = Qwen4ExpConfig(vision_config=tower(), text_config=text, **IDS)
    return tiny_model("qwen4_exp", Qwen4ExpForConditionalGeneration, config, seed=seed, slow="A_log", **media())
