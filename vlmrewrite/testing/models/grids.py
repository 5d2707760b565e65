"""Families that take packed patches of images and videos with a grid of each, and write the time before each frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CohereCompassConfig,
    CohereCompassForConditionalGeneration,
    Lfm3Config,
    Lfm3VlConfig,
    Lfm3VlForConditionalGeneration,
)

from vlmrewrite.testing.models.tiny import (
    END,
    HIDDEN,
    IMAGE,
    START,
    VIDEO,
    TinyVLM,
    choice,
    decoder_sizes,
    text_tokens,
    tiny_model,
    tower_sizes,
)

IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}


def lfm3_vl(layers: int = 4, seed: int = 0) -> TinyVLM:
    """LFM3-VL: 4 to 12 tokens an image; convolutions, gated attention, full and in windows of 8 tokens, in turn."""
    kinds = [("conv", "full_attention", "conv", "sliding_attention")[i % 4] for i in range(layers)]
    tower = tower_sizes(num_hidden_layers=2, num_key_value_heads=1, layer_types=["conv", "full_attention"])
    text = decoder_sizes(layers, head_dim=8, layer_types=kinds, sliding_window=8, tie_word_embeddings=False)
    config = Lfm3VlConfig(
        vision_config=tower,
        text_config=Lfm3Config(**text),
        projector_hidden_size=HIDDEN,
        tie_word_embeddings=False,
        **IDS,
    )
    return tiny_model("lfm3_vl", Lfm3VlForConditionalGeneration, config, _pictures, seed, **_VIDEOS)


def cohere_compass(layers: int = 4, seed: int = 0) -> TinyVLM:
    """North Micro Vision: attention beside the MLP, multimodal rope in windows of 8, none in full layers, DeepStack."""
    kinds = [("full_attention", "sliding_attention")[bool((i + 1) % 4)] for i in range(layers)]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    tower = tower_sizes(depth=3, num_heads=2, out_hidden_size=HIDDEN, num_position_embeddings=64)
    del tower["num_hidden_layers"], tower["num_attention_heads"]
    text = decoder_sizes(layers, layer_types=kinds, sliding_window=8, tie_word_embeddings=False)
    config = CohereCompassConfig(
        vision_config={**tower, "deepstack_visual_indexes": [0, 1]},
        text_config={**text, "rope_parameters": {"sliding_attention": rope, "full_attention": None}},
        **IDS,
    )
    kind = CohereCompassForConditionalGeneration
    return tiny_model("cohere_compass", kind, config, _pictures, seed, "mm_token_type_ids", **_VIDEOS)


def _pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Images of 4 to 12 tokens, each of them 2 by 2 patches of 4 by 4 pixels."""
    options = [(1, 4, 4), (1, 4, 8), (1, 6, 8), (1, 6, 4)]
    grids = [options[choice(generator, len(options))] for _ in range(sum(counts))]
    ids = [[START, *[IMAGE] * (h * w // 4), END] for _, h, w in grids]
    return ids, {"pixel_values": _patches(grids, generator), "image_grid_thw": torch.tensor(grids)}


def _clips(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
    """Videos of two or three times two frames, 1 to 2 tokens a pair, the time in front of each pair."""
    options = [(2, 2, 4), (3, 2, 2), (2, 4, 2)]
    grids = [options[choice(generator, len(options))] for _ in range(sum(counts))]
    pairs = [[[*text_tokens(2, generator), START, *[VIDEO] * (h * w // 4), END] for _ in range(t)] for t, h, w in grids]
    ids = [[x for pair in video for x in pair] for video in pairs]
    return ids, {"pixel_values_videos": _patches(grids, generator), "video_grid_thw": torch.tensor(grids)}


def _patches(grids: Sequence[tuple[int, int, int]], generator: torch.Generator) -> Tensor:
    """Pixels [patches, 3 channels * 2 frames * 4 * 4]."""
    return torch.randn(sum(t * h * w for t, h, w in grids), 3 * 2 * 4 * 4, generator=generator)


_VIDEOS: dict[str, Any] = {"video_token_id": VIDEO, "clips": _clips}
