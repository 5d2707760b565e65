"""Muse models: windows in the tower and in the decoder, queries scaled after their norm, soft-capped logits."""

from __future__ import annotations

from typing import Any

from transformers import (
    MuseGlimmerConfig,
    MuseGlimmerForConditionalGeneration,
    MuseSparkConfig,
    MuseSparkForConditionalGeneration,
)

from vlmrewrite.testing.models.qwen import CLIPS, GRIDS, Grid, image_ids
from vlmrewrite.testing.models.tiny import (
    HIDDEN,
    IMAGE,
    SPECIAL,
    TILE,
    VIDEO,
    TinyVLM,
    decoder_sizes,
    patches,
    tiny_model,
    tower_sizes,
)

CLIP_START, CLIP_END, CUT = 1, 7, 60

ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}


def frames(grid: Grid) -> list[int]:
    """A video between its markers: steps of time behind the seconds they are from, a separator between two."""
    n = grid[1] * grid[2] // 4
    steps = [t for step in range(grid[0]) for t in (SPECIAL + step, SPECIAL + 9, *[VIDEO] * n, CUT)]
    return [CLIP_START, *steps[:-1], CLIP_END]


def media() -> dict[str, Any]:
    """Images and videos in patches of two frames."""
    shape = [3 * 2 * 4 * 4]
    clips = patches(CLIPS, shape, frames, ("pixel_values_videos", "video_grid_thw"))
    return {"pictures": patches(GRIDS, shape, image_ids), "clips": clips, "video_token_id": VIDEO}


def parts() -> dict[str, Any]:
    """Configurations of the tower, whose first layer has windows of 16 patches, and of its projection."""
    kinds = ["window_attention", "full_attention"]
    vision: dict[str, Any] = tower_sizes(num_hidden_layers=2, pos_emb_height=4, pos_emb_width=4, layer_types=kinds)
    vision["max_position_embeddings"] = 16
    sizes: dict[str, Any] = {"out_hidden_size": 4 * HIDDEN, "projector_hidden_size": HIDDEN}
    return {"vision_config": vision, "image_token_id": IMAGE, "video_token_id": VIDEO, **sizes}


def muse_glimmer(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Muse Glimmer: three layers with a window of 8 to one that sees all and has no rope, norms on both sides."""
    text: dict[str, Any] = decoder_sizes(
        layers, head_dim=8, sliding_window=8, output_multiplier=1.0, rope_parameters=ROPE
    )
    config = MuseGlimmerConfig(text_config=text, **parts())
    return tiny_model("muse_glimmer", MuseGlimmerForConditionalGeneration, config, seed=seed, **media())


def muse_spark(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Muse Spark: Muse Glimmer with gates on the residual stream, and two of four experts of half the width."""
    experts: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
    experts |= {"moe_hidden_size": HIDDEN // 2, "mlp_layer_types": ["sparse" if i else "dense" for i in range(layers)]}
    text: dict[str, Any] = decoder_sizes(
        layers, head_dim=8, sliding_window=8, output_multiplier=1.0, rope_parameters=ROPE, **experts
    )
    audio: dict[str, Any] = {"patch_sizes": [4, 4], "hidden_sizes": [8, 16], "depths": [1, 1], "num_hidden_layers": 2}
    audio |= {"out_hidden_size": HIDDEN}
    config = MuseSparkConfig(text_config=text, audio_config=audio, audio_token_id=TILE, **parts())
    return tiny_model("muse_spark", MuseSparkForConditionalGeneration, config, seed=seed, **media())
