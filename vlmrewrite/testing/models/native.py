"""Models whose towers take images of any size as patches, beside the Qwen and GLM ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
    Exaone4_5_Config,
    Exaone4_5_ForConditionalGeneration,
    Exaone4Config,
    HunYuanVLConfig,
    HunYuanVLForConditionalGeneration,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
    MiniMaxM3SparseForConditionalGeneration,
    MiniMaxM3VLConfig,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    Qwen2Config,
    VideoLlama3Config,
    VideoLlama3ForConditionalGeneration,
)

from vlmrewrite.testing.models.qwen import GRIDS, IDS, Grid, image_ids, media, rope, tower
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
    tower_sizes,
)

ABSENT: dict[str, str] = {
    "keye": "transformers 5.23 has no such model",
    "glm_image": "images become codes that are written into the prompt as token ids; no features enter the decoder",
    "neomme": "an encoder for masked words and for retrieval; it generates nothing",
    "qwen2_5_omni": "a thinker, a talker and a vocoder without a forward of their own; the thinker has a builder",
    "qwen3_omni_moe": "a thinker, a talker and a vocoder without a forward of their own; the thinker has a builder",
}
"""Kin of these families that have no builder, and why."""

CLIP_START, CLIP_END = 1, 7

CLIP_NAMES = ("pixel_values_videos", "video_grid_thw")


def paddleocr_vl(layers: int = 4, seed: int = 0) -> TinyVLM:
    """PaddleOCR-VL: images only, multimodal rope, positions of the tower sampled bilinearly, a decoder of ERNIE 4.5."""
    text: dict[str, Any] = decoder_sizes(layers, head_dim=8, rope_parameters=rope(2, 1, 1), tie_word_embeddings=False)
    vision: dict[str, Any] = tower_sizes(image_size=32)
    config = PaddleOCRVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False, **IDS)
    pictures = patches(GRIDS, [3, 4, 4], image_ids)
    kind = PaddleOCRVLForConditionalGeneration
    return tiny_model("paddleocr_vl", kind, config, pictures, seed, "mm_token_type_ids")


def ernie4_5_vl_moe(layers: int = 4, seed: int = 0) -> TinyVLM:
    """ERNIE 4.5 VL: vision tokens and their markers have experts of their own, pairs of frames are merged."""
    experts: dict[str, Any] = {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": [32, 16],
    }
    text: dict[str, Any] = decoder_sizes(layers, rope_parameters=rope(1, 1, 2), tie_word_embeddings=False, **experts)
    vision: dict[str, Any] = {
        "depth": 1,
        "hidden_size": HIDDEN,
        "num_heads": 2,
        "patch_size": 4,
        "intermediate_size": 2 * HIDDEN,
    }
    config = Ernie4_5_VLMoeConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=CLIP_START,
        video_end_token_id=CLIP_END,
        tie_word_embeddings=False,
    )

    def clip_ids(grid: Grid) -> list[int]:
        return [CLIP_START, *[VIDEO] * (grid[0] * grid[1] * grid[2] // 8), CLIP_END]

    def with_experts(inputs: dict[str, Any]) -> dict[str, Any]:
        ids = inputs["input_ids"]
        image, video = (torch.isin(ids, torch.tensor(own)) for own in ([IMAGE, START, END], [VIDEO, 1, 7]))
        return inputs | {"moe_mm_token_type_ids": image.long() + 2 * video.long()}

    return tiny_model(
        "ernie4_5_vl_moe",
        Ernie4_5_VLMoeForConditionalGeneration,
        config,
        patches(GRIDS, [3 * 4 * 4], image_ids),
        seed,
        "mm_token_type_ids",
        video_token_id=VIDEO,
        clips=patches([(2, 4, 4), (4, 4, 4), (4, 6, 4)], [3 * 4 * 4], clip_ids, CLIP_NAMES),
        finish=with_experts,
    )


def hunyuan_vl(layers: int = 4, seed: int = 0) -> TinyVLM:
    """HunYuanVL: rope over place, column, row and image; image tokens for line ends and both ends of an image.

    Images are numbered over the whole batch, so that those of a row have other positions after other rows.
    """
    text: dict[str, Any] = decoder_sizes(
        layers, head_dim=8, rope_parameters=rope(1, 1, 1, 1), tie_word_embeddings=False
    )
    vision: dict[str, Any] = tower_sizes(max_image_size=32, out_hidden_size=HIDDEN)
    config = HunYuanVLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        im_start_id=START,
        im_end_id=END,
        tie_word_embeddings=False,
    )

    def ids(grid: Grid) -> list[int]:
        return [START, *[IMAGE] * (grid[1] // 2 * (grid[2] // 2 + 1) + 2), END]

    pictures = patches(GRIDS, [3 * 4 * 4], ids)
    return tiny_model("hunyuan_vl", HunYuanVLForConditionalGeneration, config, pictures, seed, "mm_token_type_ids")


def video_llama_3(layers: int = 4, seed: int = 0) -> TinyVLM:
    """VideoLLaMA 3: plain rope, images unmerged, tokens of a video that repeat the frame before are left out."""
    vision: dict[str, Any] = tower_sizes()
    text = Qwen2Config(**decoder_sizes(layers))
    config = VideoLlama3Config(vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=VIDEO)
    images = patches([(1, 2, 2), (1, 2, 4), (1, 3, 4)], [3 * 4 * 4], lambda grid: [IMAGE] * (grid[1] * grid[2]))
    frames = patches([(2, 4, 4), (3, 4, 4), (3, 6, 4)], [3 * 4 * 4], lambda grid: [*grid], CLIP_NAMES)

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        ids, inputs = images(counts, generator)
        return ids, inputs | {"image_merge_sizes": torch.ones(len(ids), dtype=torch.int64)}

    def clips(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        grids, inputs = frames(counts, generator)
        ids, kept = [], []
        for t, h, w in grids:
            keep = torch.rand(t, h * w // 4, generator=generator) < 0.7
            keep[0] = True
            kept.append(keep.flatten())
            ids.append([i for step, n in enumerate(keep.sum(1).tolist()) for i in (SPECIAL + step, 17, *[VIDEO] * n)])
        sizes = torch.full([len(ids)], 2)
        return ids, inputs | {"video_merge_sizes": sizes, "video_compression_mask": torch.cat(kept)}

    kind = VideoLlama3ForConditionalGeneration
    return tiny_model("video_llama_3", kind, config, pictures, seed, clips=clips, video_token_id=VIDEO)


def minimax_m3_vl(layers: int = 4, seed: int = 0) -> TinyVLM:
    """MiniMax M3: after the first layer, two of four experts and the two best blocks of four keys, by an indexer."""
    kinds: dict[str, Any] = {
        "layer_types": [("minimax_m3_sparse" if i else "full_attention") for i in range(layers)],
        "mlp_layer_types": [("sparse" if i else "dense") for i in range(layers)],
    }
    indexer: dict[str, Any] = {"index_n_heads": 2, "index_head_dim": 8, "index_block_size": 4, "index_topk_blocks": 2}
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
    sizes: dict[str, Any] = {
        "dense_intermediate_size": 2 * HIDDEN,
        "shared_intermediate_size": HIDDEN,
        "head_dim": 8,
        "rotary_dim": 4,
    }
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    text: dict[str, Any] = decoder_sizes(layers, rope_parameters=rotary, **kinds, **indexer, **experts, **sizes)
    config = MiniMaxM3VLConfig(
        vision_config=tower_sizes(image_size=32),
        text_config=text,
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        projector_hidden_size=HIDDEN,
    )
    both: dict[str, Any] = media() | {"token_types": None}
    return tiny_model("minimax_m3_vl", MiniMaxM3SparseForConditionalGeneration, config, seed=seed, **both)


def kimi_k25(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Kimi K2.5: keys and values of a low rank, a dense layer, then two of four experts in two groups; images only.

    Its processor cuts videos into chunks of four frames, for which the tower of transformers 5.23 splits wrongly.
    """
    ranks: dict[str, Any] = {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    experts: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    sizes: dict[str, Any] = {"first_k_dense_replace": 1, "moe_intermediate_size": HIDDEN, "num_key_value_heads": 4}
    vision: dict[str, Any] = tower_sizes(pos_emb_height=8, pos_emb_width=8)
    config = Kimi_K25Config(
        vision_config=vision,
        text_config=DeepseekV3Config(**decoder_sizes(layers, **ranks, **experts, **sizes)),
        projection_hidden_size=HIDDEN,
        tie_word_embeddings=False,
        **IDS,
    )
    pictures = patches(GRIDS, [3, 4, 4], image_ids)
    return tiny_model("kimi_k25", Kimi_K25ForConditionalGeneration, config, pictures, seed)


def exaone4_5(layers: int = 4, seed: int = 0) -> TinyVLM:
    """EXAONE 4.5: three layers with a window of 8 to one that sees all and has no positions; norms after."""
    kinds = [("full_attention" if i % 4 == 3 else "sliding_attention") for i in range(layers)]
    text: dict[str, Any] = decoder_sizes(layers, sliding_window=8, sliding_window_pattern="LLLG", layer_types=kinds)
    vision: dict[str, Any] = tower(2, num_heads=4, num_key_value_heads=2, window_size=16, fullatt_block_indexes=[1])
    del vision["num_position_embeddings"]
    ids: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}
    config = Exaone4_5_Config(vision_config=vision, text_config=Exaone4Config(**text), **ids)
    both: dict[str, Any] = media(stamped=False) | {"token_types": None}
    return tiny_model("exaone4_5", Exaone4_5_ForConditionalGeneration, config, seed=seed, **both)
