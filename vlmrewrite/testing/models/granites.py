"""The Granite families, which add features of the vision tower to the stream between layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    Granite4VisionConfig,
    Granite4VisionForConditionalGeneration,
    GraniteDoclingConfig,
    GraniteDoclingForConditionalGeneration,
    SiglipVisionConfig,
)

from vlmrewrite.testing.models.llavas import tiled
from vlmrewrite.testing.models.tiles import LINE, WHOLE, grids_of_tiles, padded
from vlmrewrite.testing.models.tiny import HIDDEN, IMAGE, START, TILE, TinyVLM, decoder_sizes, tiny_model, tower_sizes

SCALES = {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.7}


def granite4_vision(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Granite 4 Vision: image tokens begin as zeros, features of the tower are added in front of layers 0 to 3."""
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    # The resampler has a head for each 64 channels of the tower.
    wide: dict[str, Any] = {"hidden_size": 2 * HIDDEN, "num_hidden_layers": 2, "image_size": 16}
    config = Granite4VisionConfig(
        vision_config=SiglipVisionConfig(**tower_sizes(vision_use_head=False) | wide),
        text_config=decoder_sizes(layers, attention_multiplier=8**-0.5, **SCALES),
        qformer_config={"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": HIDDEN},
        image_token_index=IMAGE,
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="full",
        downsample_rate="1/2",
        deepstack_layer_map=[[1, 1], [-1, 0]][2 - min(layers, 2) :],
        spatial_target_layers=list(range(2, min(layers, 4))),
    )

    def lengths(empty: list[Tensor], sizes: Tensor) -> list[int]:
        base = tiny.model.base_model
        return [len(x) for x in base.pack_image_features(empty, sizes, "full", base.image_newline)]

    pictures = tiled(pinpoints, lengths, side=16)
    tiny = tiny_model("granite4_vision", Granite4VisionForConditionalGeneration, config, pictures, seed)
    return tiny


def granite_docling(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Granite for Docling: tiles of 4 tokens behind two markers; features of the tower added behind layers 0 and 1."""
    tower = tower_sizes(image_size=16, num_hidden_layers=3, out_hidden_size=HIDDEN, scale_factor=2)
    config = GraniteDoclingConfig(
        vision_config={**tower, "deepstack_visual_indexes": [0, 1]},
        text_config=decoder_sizes(layers, attention_multiplier=8**-0.5, **SCALES),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )

    def ids(h: int, w: int) -> list[int]:
        rows = [*[START, TILE, *[IMAGE] * 4] * w, LINE] * h
        return rows + [LINE, START, WHOLE, *[IMAGE] * 4, START] * (h * w > 1)

    tiles = padded(grids_of_tiles(16, ids), 16, 4)

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        ids, inputs = tiles(counts, generator)
        return ids, inputs | {"pixel_attention_mask": inputs["pixel_attention_mask"][:, :, 0, 0].bool()}

    return tiny_model("granite_docling", GraniteDoclingForConditionalGeneration, config, pictures, seed)
