"""Families with the Pixtral tower: images of any size, a marker behind each row of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LightOnOcrConfig,
    LightOnOcrForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    Mistral4Config,
    MistralConfig,
    MistralLarge4Config,
    MistralLarge4ForConditionalGeneration,
    PixtralVisionConfig,
    Qwen3Config,
)

from vlmrewrite.testing.models.tiny import (
    END,
    HIDDEN,
    IMAGE,
    TILE,
    Pictures,
    TinyVLM,
    choice,
    decoder_sizes,
    tiny_model,
    tower_sizes,
)

ABSENT: dict[str, str] = {
    "mistral4": "a decoder without images; models with images are Mistral 3 with this decoder: see mistral3_mistral4",
    "pixtral": "a vision tower; the model around it is LLaVA: see llava_pixtral",
}
"""Model types without a builder, and why."""

BREAK = TILE


def llava_pixtral(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Pixtral: LLaVA with images of any size, 4 to 12 tokens each, a break behind each row; Mistral."""
    config = LlavaConfig(
        vision_config=_tower(),
        text_config=MistralConfig(**decoder_sizes(layers, sliding_window=None)),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return tiny_model("llava_pixtral", LlavaForConditionalGeneration, config, _pictures(4), seed)


def mistral3(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Mistral Small 3.1: 2 by 2 patches of the Pixtral tower are merged into a token."""
    return _mistral3("mistral3", MistralConfig(**decoder_sizes(layers, sliding_window=None)), seed)


def mistral3_mistral4(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Mistral Small 4: the same with latent attention, experts, and q that grow with the position."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale_all_dim": 1.0,
        "mscale": 1.0,
        "llama_4_scaling_beta": 0.5,
    }
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 16}
    text = decoder_sizes(layers, num_key_value_heads=4, rope_parameters=rope, **latent, **_experts())
    return _mistral3("mistral3_mistral4", Mistral4Config(**text), seed)


def _mistral3(name: str, text: Any, seed: int) -> TinyVLM:
    config = Mistral3Config(
        vision_config=_tower(),
        text_config=text,
        image_token_index=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return tiny_model(name, Mistral3ForConditionalGeneration, config, _pictures(8), seed)


def mistral_large4(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Mistral Large 4: latent attention to the 8 best keys, keys and choices of other layers used again, experts."""
    shares = [i % 4 == 2 for i in range(layers)]
    latent = {"kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    text = decoder_sizes(
        layers,
        num_key_value_heads=4,
        index_topk=8,
        index_head_dim=8,
        index_n_heads=2,
        kv_source_layers=[i - share for i, share in enumerate(shares)],
        indexer_types=[("full", "shared")[share] for share in shares],
        **latent,
        **_experts(),
    )
    config = MistralLarge4Config(
        vision_config=_tower(), text_config=text, image_token_index=IMAGE, spatial_merge_size=2
    )
    return tiny_model("mistral_large4", MistralLarge4ForConditionalGeneration, config, _pictures(8), seed)


def lighton_ocr(layers: int = 4, seed: int = 0) -> TinyVLM:
    """LightOnOCR: the merged tokens of Mistral 3 without markers; Qwen 3."""
    config = LightOnOcrConfig(
        vision_config=_tower(),
        text_config=Qwen3Config(**decoder_sizes(layers, head_dim=8)),
        image_token_id=IMAGE,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    kind, pictures = LightOnOcrForConditionalGeneration, _pictures(8, marked=False)
    return tiny_model("lighton_ocr", kind, config, pictures, seed)


def _tower() -> PixtralVisionConfig:
    return PixtralVisionConfig(**tower_sizes(image_size=32))


def _experts() -> dict[str, int]:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return {**experts, "moe_intermediate_size": HIDDEN}


def _pictures(size: int, *, marked: bool = True) -> Pictures:
    """Images of 2 to 4 by 2 to 3 tokens of ``size`` by ``size`` pixels, in one tensor with zeros around them."""

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(2, 2), (2, 3), (4, 2), (3, 3)]
        grids = [options[choice(generator, len(options))] for _ in range(sum(counts))]
        pixels = torch.zeros(len(grids), 3, *(size * max(sides) for sides in zip(*grids, strict=True)))
        ids = []
        for image, (h, w) in zip(pixels, grids, strict=True):
            image[:, : h * size, : w * size] = torch.randn(3, h * size, w * size, generator=generator)
            row = [IMAGE] * w + [BREAK] * marked
            ids.append([*(row * h)[:-1], END] if marked else row * h)
        return ids, {"pixel_values": pixels, "image_sizes": torch.tensor(grids) * size}

    return pictures
