"""Thinkers of the Qwen-Omni models, and what follows them: vision beside audio, of which there is none here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerConfig,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from vlmrewrite.testing.models.qwen import EXPERTS, media, rope, tower
from vlmrewrite.testing.models.tiny import HIDDEN, IMAGE, START, TILE, VIDEO, TinyVLM, decoder_sizes, tiny_model

AUDIO: dict[str, Any] = {
    "d_model": HIDDEN,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": HIDDEN,
}

IDS: dict[str, Any] = {
    "vision_start_token_id": START,
    "audio_start_token_id": 1,
    "audio_end_token_id": 7,
    "user_token_id": 9,
}


def timed() -> dict[str, Any]:
    """Images and videos, of which the seconds between steps are told; these set the positions in time."""
    both: dict[str, Any] = media(stamped=False) | {"token_types": None}
    untimed = both["clips"]

    def clips(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        ids, inputs = untimed(counts, generator)
        return ids, inputs | {"video_second_per_grid": torch.ones(len(ids))}

    return both | {"clips": clips}


def qwen2_5_omni_thinker(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Qwen2.5-Omni's thinker: a tower with windows, multimodal rope in which a second is 25 positions."""
    vision: dict[str, Any] = tower(2, window_size=16, fullatt_block_indexes=[1])
    del vision["num_position_embeddings"]
    config = Qwen2_5OmniThinkerConfig(
        vision_config=vision,
        audio_config={**AUDIO, "num_mel_bins": 16, "output_dim": HIDDEN, "n_window": 4},
        text_config=decoder_sizes(layers, rope_parameters=rope(2, 1, 1), tie_word_embeddings=False),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=TILE,
        **IDS,
    )
    kind = Qwen2_5OmniThinkerForConditionalGeneration
    return tiny_model("qwen2_5_omni_thinker", kind, config, seed=seed, **timed())


def qwen3_omni_moe_thinker(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Qwen3-Omni's thinker: DeepStack after the first three layers, two of four experts, a second is 25 positions."""
    text: dict[str, Any] = decoder_sizes(
        layers, head_dim=8, rope_parameters=rope(2, 1, 1, mrope_interleaved=True), **EXPERTS
    )
    config = Qwen3OmniMoeThinkerConfig(
        vision_config=tower(4, deepstack_visual_indexes=[0, 1, 2]),
        audio_config={**AUDIO, "num_mel_bins": 16, "output_dim": HIDDEN, "downsample_hidden_size": 8},
        text_config=text,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        audio_token_id=TILE,
        **IDS,
    )
    kind = Qwen3OmniMoeThinkerForConditionalGeneration
    return tiny_model("qwen3_omni_moe_thinker", kind, config, seed=seed, **timed())
