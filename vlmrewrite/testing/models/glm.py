"""GLM-V models: multimodal rope, videos as frames that are marked and written like images."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    GlmgaConfig,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
)

from vlmrewrite.testing.models.qwen import CLIPS, GRIDS, Grid, image_ids, rope
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

CLIP_START, CLIP_END = 1, 7

IDS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "video_start_token_id": CLIP_START,
    "video_end_token_id": CLIP_END,
}


def frames(grid: Grid) -> list[int]:
    """A video between its markers: frames, each written as an image is, and behind each the second it is from."""
    inner = [t for step in range(grid[0]) for t in (*image_ids((1, *grid[1:])), SPECIAL + step)]
    return [CLIP_START, *inner, CLIP_END]


def with_types(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs with the types of tokens: image tokens between the markers of a video are of the video."""
    ids = inputs["input_ids"]
    inside = ids.eq(CLIP_START).cumsum(1) > ids.eq(CLIP_END).cumsum(1)
    return inputs | {"mm_token_type_ids": torch.where(ids == IMAGE, 1 + inside.long(), 0)}


def media() -> dict[str, Any]:
    """Images and videos; the tokens of both are the same, so that one call takes the one or the other."""
    shape = [3 * 2 * 4 * 4]
    return {
        "pictures": patches(GRIDS, shape, image_ids),
        "clips": patches(CLIPS, shape, frames, ("pixel_values_videos", "video_grid_thw")),
        "video_token_id": IMAGE,
        "finish": with_types,
    }


def tower(**more: Any) -> dict[str, Any]:
    """Arguments of the configuration of a vision tower."""
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
    }
    return {"depth": 1, "patch_size": 4, "image_size": 32, **sizes, **more}


def glm4v(layers: int = 4, seed: int = 0) -> TinyVLM:
    """GLM-4.1V: norms before and after each half of a layer, fused gate and up, positions sampled bicubically."""
    text: dict[str, Any] = decoder_sizes(layers, rope_parameters=rope(2, 1, 1))
    config = Glm4vConfig(vision_config=tower(), text_config=text, **IDS)
    return tiny_model("glm4v", Glm4vForConditionalGeneration, config, seed=seed, **media())


def glm4v_moe(layers: int = 4, seed: int = 0) -> TinyVLM:
    """GLM-4.5V: a dense layer, then two of four experts a token in two groups, a shared expert, half rotated heads."""
    experts: dict[str, Any] = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": HIDDEN,
    }
    rotary: dict[str, Any] = rope(2, 1, 1, partial_rotary_factor=0.5)
    text: dict[str, Any] = decoder_sizes(
        layers, head_dim=16, rope_parameters=rotary, n_group=2, topk_group=1, **experts
    )
    config = Glm4vMoeConfig(vision_config=tower(), text_config=text, **IDS)
    return tiny_model("glm4v_moe", Glm4vMoeForConditionalGeneration, config, seed=seed, **media())


def glm46v(layers: int = 4, seed: int = 0) -> TinyVLM:
    """GLM-4.6V: the tower and the decoder of GLM-4.1V in a model class of its own."""
    return glm46v_of("glm46v", Glm46VConfig, layers, seed)


def glmga(layers: int = 4, seed: int = 0) -> TinyVLM:
    """GLM-GA: the model of GLM-4.6V under a configuration of its own."""
    return glm46v_of("glmga", GlmgaConfig, layers, seed)


def glm46v_of(name: str, kind: Any, layers: int, seed: int) -> TinyVLM:
    """The model of GLM-4.6V with a configuration of this class."""
    text: dict[str, Any] = decoder_sizes(layers, rope_parameters=rope(2, 1, 1))
    parts: dict[str, Any] = {"text_config": {"model_type": "glm4v_text", **text}, "vision_config": tower()}
    config = kind(**parts, **IDS)
    return tiny_model(name, Glm46VForConditionalGeneration, config, seed=seed, **media())


def glm_ocr(layers: int = 4, seed: int = 0) -> TinyVLM:
    """GLM-OCR: the decoder of GLM-4.1V, a tower that normalises q and k and learns no positions."""
    text: dict[str, Any] = decoder_sizes(layers, head_dim=8, rope_parameters=rope(2, 1, 1))
    config = GlmOcrConfig(vision_config=tower(), text_config=text, **IDS)
    return tiny_model("glm_ocr", GlmOcrForConditionalGeneration, config, seed=seed, **media())
