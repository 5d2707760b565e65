"""Families whose vision tower is not one plain transformer: convolutions, windows, two towers, frames as tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    DeepseekVLHybridConfig,
    DeepseekVLHybridForConditionalGeneration,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    LlamaConfig,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from vlmrewrite.testing.models.llavas import FRAMES, frames
from vlmrewrite.testing.models.tiny import (
    HIDDEN,
    IMAGE,
    VIDEO,
    TinyVLM,
    decoder_sizes,
    square,
    tiled,
    tiny_model,
    tower_sizes,
)


def fast_vlm(layers: int = 4, seed: int = 0) -> TinyVLM:
    """FastVLM: a convolutional tower, 9 tokens an image; Qwen 2."""
    # The tower of the released model needs timm; any convolutional tower gives features of the same shape.
    tower: dict[str, Any] = {"hidden_sizes": [HIDDEN, HIDDEN], "depths": [1, 1], "num_stages": 2, "hidden_size": HIDDEN}
    config = FastVlmConfig(
        vision_config=ConvNextConfig(**tower),
        text_config=Qwen2Config(**decoder_sizes(layers)),
        image_token_index=IMAGE,
        image_seq_length=9,
    )
    return tiny_model("fast_vlm", FastVlmForConditionalGeneration, config, square(24, 9), seed)


def perception_lm(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Perception LM: a thumbnail and two tiles an image, frames of a video, 4 pooled tokens each; Llama."""
    # The tower of the released model needs timm; CLIP has a class token in front of its patches as that one has.
    tower = tower_sizes(image_size=16, projection_dim=HIDDEN, model_args={"embed_dim": HIDDEN})
    config = PerceptionLMConfig(
        vision_config=CLIPVisionConfig(**tower),
        text_config=LlamaConfig(**decoder_sizes(layers)),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        projector_pooling_ratio=2,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        pixels = torch.randn(sum(counts), 3, 3, 16, 16, generator=generator)
        return [[IMAGE] * 12] * len(pixels), {"pixel_values": pixels}

    videos: dict[str, Any] = {"video_token_id": VIDEO, "clips": frames(16, 4 * FRAMES)}
    return tiny_model("perception_lm", PerceptionLMForConditionalGeneration, config, pictures, seed, **videos)


def got_ocr2(layers: int = 4, seed: int = 0) -> TinyVLM:
    """GOT-OCR 2: a tower with windows and relative positions, one tile or two and a thumbnail, 4 tokens a tile."""
    config = GotOcr2Config(
        vision_config=_windows(32),
        text_config=Qwen2Config(**decoder_sizes(layers, tie_word_embeddings=False)),
        image_token_index=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )

    return tiny_model("got_ocr2", GotOcr2ForConditionalGeneration, config, tiled(32), seed)


def deepseek_vl(layers: int = 4, seed: int = 0) -> TinyVLM:
    """DeepSeek-VL: SigLIP and Llama, 4 tokens an image."""
    config = DeepseekVLConfig(
        vision_config=SiglipVisionConfig(**tower_sizes(image_size=8, vision_use_head=False)),
        text_config=LlamaConfig(**decoder_sizes(layers)),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return tiny_model("deepseek_vl", DeepseekVLForConditionalGeneration, config, square(8, 4), seed)


def deepseek_vl_hybrid(layers: int = 4, seed: int = 0) -> TinyVLM:
    """DeepSeek-VL 7B: features of SigLIP and, from a larger picture, of SAM side by side, 4 tokens an image."""
    config = DeepseekVLHybridConfig(
        vision_config=SiglipVisionConfig(**tower_sizes(image_size=8, vision_use_head=False)),
        high_res_vision_config=_windows(8, model_type="sam_vision_model"),
        text_config=LlamaConfig(**decoder_sizes(layers)),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    small = square(8, 4)

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        ids, inputs = small(counts, generator)
        return ids, inputs | {"high_res_pixel_values": torch.randn(len(ids), 3, 32, 32, generator=generator)}

    kind = DeepseekVLHybridForConditionalGeneration
    return tiny_model("deepseek_vl_hybrid", kind, config, pictures, seed)


def _windows(channels: int, **more: Any) -> dict[str, Any]:
    """A tower as SAM's for 32 by 32 pixels: attention in windows of 4 by 4 patches, and to all in the last layer."""
    sizes = tower_sizes(image_size=32, num_hidden_layers=2, mlp_dim=2 * HIDDEN, window_size=4, **more)
    del sizes["intermediate_size"]
    return {**sizes, "output_channels": channels, "global_attn_indexes": [1]}
