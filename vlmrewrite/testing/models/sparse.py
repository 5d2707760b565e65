"""Models whose decoders see few of the keys: indexers and windows, beside linear attention and experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Dots3NoteConfig,
    Dots3NoteForConditionalGeneration,
    Glm5NextConfig,
    Glm5NextForConditionalGeneration,
    Step3p7Config,
    Step3p7ForConditionalGeneration,
)

from vlmrewrite.testing.models import glm
from vlmrewrite.testing.models.qwen import CLIPS, GRIDS, Grid, hybrid, image_ids, video_ids
from vlmrewrite.testing.models.tiny import (
    END,
    HIDDEN,
    IMAGE,
    SPECIAL,
    START,
    TILE,
    VIDEO,
    TinyVLM,
    choice,
    decoder_sizes,
    patches,
    tiny_model,
    tower_sizes,
)

CLIP_NAMES = ("pixel_values_videos", "video_grid_thw")

INDEXER: dict[str, Any] = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 16}

EXPERTS: dict[str, Any] = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": HIDDEN,
}

TILE_END, NEWLINE = 1, 7


def glm5_next(layers: int = 4, seed: int = 0) -> TinyVLM:
    """GLM-5.3-Flash: four mixed residual streams; three layers of linear attention to one of indexed keys, no rope.

    The tokens of videos are image tokens between the markers of a video.
    """
    ranks: dict[str, Any] = {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 0,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    linear: dict[str, Any] = {"linear_head_dim": 16, "linear_num_heads": 2, "linear_lower_bound": -0.5}
    streams: dict[str, Any] = {"hc_mult": 4, "hc_sinkhorn_iters": 4}
    kinds: dict[str, Any] = {
        "mlp_layer_types": ["sparse" if i else "dense" for i in range(layers)],
        "layer_types": hybrid(layers)["layer_types"],
        "num_key_value_heads": 4,
    }
    text: dict[str, Any] = decoder_sizes(
        layers, index_kpool=4, **streams, **ranks, **linear, **INDEXER, **EXPERTS, **kinds
    )
    vision: dict[str, Any] = glm.tower(projection_intermediate_size=HIDDEN)
    config = Glm5NextConfig(vision_config=vision, text_config=text, **glm.IDS)

    def frames(grid: Grid) -> list[int]:
        inner = [t for step in range(grid[0]) for t in (*image_ids((1, *grid[1:])), SPECIAL + step, SPECIAL + 9)]
        return [glm.CLIP_START, *inner, glm.CLIP_END]

    shape = [3 * 2 * 4 * 4]
    return tiny_model(
        "glm5_next",
        Glm5NextForConditionalGeneration,
        config,
        patches(GRIDS, shape, image_ids),
        seed,
        clips=patches(CLIPS, shape, frames, CLIP_NAMES),
        video_token_id=IMAGE,
        finish=glm.with_types,
    )


def dots3_note(layers: int = 4, seed: int = 0) -> TinyVLM:
    """dots3-note: low-rank keys; layers of indexed keys and layers with a window of 8 and other heads; experts in both.

    The second layer of the tower has experts too.
    """
    ranks: dict[str, Any] = {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    }
    window: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8}
    window |= {"head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
    heads: dict[str, Any] = {
        "head_dim": 12,
        "num_key_value_heads": 4,
        "sliding_window": 8,
        "shared_experts_intermediate_size": HIDDEN,
    }
    apart: dict[str, Any] = {f"swa_{name}": value for name, value in window.items()}
    text: dict[str, Any] = decoder_sizes(layers, **ranks, **INDEXER, **EXPERTS, **heads, **apart)
    vision: dict[str, Any] = tower_sizes(num_hidden_layers=2, pyramid_num_routed=[-1, 4], moe_intermediate_size=HIDDEN)
    audio: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = Dots3NoteConfig(
        vision_config={**vision, "adapter_in_dim": HIDDEN, "adapter_out_dim": HIDDEN},
        text_config=text,
        audio_config={**audio, "downsample_hidden_size": 8, "adapter_input_size": HIDDEN, "adapter_out_dim": HIDDEN},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=TILE,
    )
    pictures, clips = patches(GRIDS, [3 * 4 * 4], image_ids), patches(CLIPS, [3 * 4 * 4], video_ids, CLIP_NAMES)
    kind = Dots3NoteForConditionalGeneration
    return tiny_model("dots3_note", kind, config, pictures, seed, clips=clips, video_token_id=VIDEO)


def step3p7(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Step-3.7: tiles of 4 tokens in rows, then the image in 9; a layer that sees all to three with windows of 8.

    The layers with windows have more heads and rotate more of them; gates on heads, experts from the second layer on.
    """
    kinds = [("sliding_attention" if i % 4 else "full_attention") for i in range(layers)]
    apart: dict[str, Any] = {"layer_types": kinds, "sliding_window": 8, "num_sliding_attention_heads": 6, "head_dim": 8}
    rotary: dict[str, Any] = {"rope_theta": [10000.0 if i % 4 else 50000.0 for i in range(layers)]}
    rotary["partial_rotary_factors"] = [1.0 if i % 4 else 0.5 for i in range(layers)]
    experts: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
    experts |= {"share_expert_dim": HIDDEN, "moe_layers_enum": list(range(1, layers))}
    vision: dict[str, Any] = tower_sizes(image_size=48, max_position_embeddings=144, mlp_ratio=2.0)
    text: dict[str, Any] = decoder_sizes(layers, **apart, **rotary, **experts)
    config = Step3p7Config(vision_config=vision, text_config=text, image_token_id=IMAGE)

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        tile = [TILE, *[IMAGE] * 4, TILE_END]
        whole = [START, *[IMAGE] * 9, END]
        layouts = [[], tile * 2, [*tile * 2, NEWLINE, *tile * 2]]
        chosen = [choice(generator, len(layouts)) for _ in range(sum(counts))]
        tiles = torch.tensor([2 * n for n in chosen])
        inputs = {"pixel_values": torch.randn(len(chosen), 3, 48, 48, generator=generator), "num_local_patches": tiles}
        if int(tiles.sum()):
            inputs["pixel_values_local"] = torch.randn(int(tiles.sum()), 3, 32, 32, generator=generator)
        return [layouts[n] + whole for n in chosen], inputs

    return tiny_model("step3p7", Step3p7ForConditionalGeneration, config, pictures, seed)
