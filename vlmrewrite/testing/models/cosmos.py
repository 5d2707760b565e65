"""The reasoners of the Cosmos3 models: multimodal rope, videos as steps of time behind timestamps."""

from __future__ import annotations

from typing import Any

from transformers import (
    Cosmos3EdgeConfig,
    Cosmos3EdgeForConditionalGeneration,
    Cosmos3OmniConfig,
    Cosmos3OmniForConditionalGeneration,
)

from vlmrewrite.testing.models.qwen import CLIPS, GRIDS, IDS, image_ids, media, rope, stamped_ids, tower
from vlmrewrite.testing.models.tiny import HIDDEN, VIDEO, TinyVLM, decoder_sizes, patches, tiny_model, tower_sizes

CLIP_NAMES = ("pixel_values_videos", "video_grid_thw")


def cosmos3_edge(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Cosmos3 Edge: multimodal rope, squared ReLU without gates, positions of the tower sampled with antialiasing."""
    vision: dict[str, Any] = tower_sizes(num_patches=64)
    text: dict[str, Any] = decoder_sizes(layers, head_dim=8, rope_parameters=rope(2, 1, 1))
    config = Cosmos3EdgeConfig(vision_config=vision, text_config=text, projector_hidden_size=HIDDEN, **IDS)
    return tiny_model(
        "cosmos3_edge",
        Cosmos3EdgeForConditionalGeneration,
        config,
        patches(GRIDS, [3 * 4 * 4], image_ids),
        seed,
        "mm_token_type_ids",
        clips=patches(CLIPS, [3 * 4 * 4], stamped_ids, CLIP_NAMES),
        video_token_id=VIDEO,
    )


def cosmos3_omni(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Cosmos3's reasoner: Qwen3-VL, DeepStack included, in a model class of its own."""
    text: dict[str, Any] = decoder_sizes(layers, head_dim=8, rope_parameters=rope(2, 1, 1, mrope_interleaved=True))
    config = Cosmos3OmniConfig(
        vision_config={"model_type": "qwen3_vl_vision", **tower(4, deepstack_visual_indexes=[0, 1, 2])},
        text_config={"model_type": "qwen3_vl_text", **text},
        **IDS,
    )
    return tiny_model("cosmos3_omni", Cosmos3OmniForConditionalGeneration, config, seed=seed, **media())
