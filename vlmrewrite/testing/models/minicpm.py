"""MiniCPM-V models: a thumbnail and slices in rows, merged within the tower, before the decoder of Qwen3.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MiniCPMOcrConfig,
    MiniCPMOcrForConditionalGeneration,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    MiniCPMV4_7Config,
    MiniCPMV4_7ForConditionalGeneration,
)

from vlmrewrite.testing.models.qwen import hybrid
from vlmrewrite.testing.models.tiny import (
    END,
    IMAGE,
    SPECIAL,
    START,
    TILE,
    VIDEO,
    VOCABULARY,
    TinyVLM,
    choice,
    tiny_model,
    tower_sizes,
)

TILE_END, NEWLINE = 1, 7

ID_START, ID_END = VOCABULARY - 2, VOCABULARY - 1

IDS: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": VIDEO}

Size = tuple[int, int]

LAYOUTS: list[tuple[Size, Size, Size]] = [((2, 2), (0, 0), (0, 0)), ((1, 2), (1, 2), (2, 1)), ((2, 2), (2, 2), (2, 2))]
"""Tokens of the thumbnail in height and width, rows and columns of slices, tokens of a slice."""

FRAMES: list[Size] = [(2, 2), (1, 2), (2, 1)]


def packed(units: Sequence[Size], side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random patches of units of so many tokens, side by side in one strip [1, 3, 4, pixels], and their numbers."""
    sizes = torch.tensor(units).int() * side
    return torch.randn(1, 3, 4, 4 * int(sizes.prod(1).sum()), generator=generator), sizes


def media(side: int) -> dict[str, Any]:
    """Images and videos of which ``side`` times ``side`` patches make a token; images have numbers in the prompt."""

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        ids, units = [], []
        for number in (i for n in counts for i in range(n)):
            whole, (rows, columns), size = LAYOUTS[choice(generator, len(LAYOUTS))]
            tile = [TILE, *[IMAGE] * (size[0] * size[1]), TILE_END]
            slices = [t for row in range(rows) for t in (*[NEWLINE] * min(row, 1), *tile * columns)]
            units += [whole, *[size] * (rows * columns)]
            named = [ID_START, SPECIAL + number, ID_END]
            ids.append([*named, START, *[IMAGE] * (whole[0] * whole[1]), END, *slices])
        strip, sizes = packed(units, side, generator)
        return ids, {"pixel_values": strip, "target_sizes": sizes}

    def clips(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        ids, units = [], []
        for _ in range(sum(counts)):
            size, n = FRAMES[choice(generator, len(FRAMES))], 2 + choice(generator, 2)
            units += [size] * n
            ids.append([START, *[VIDEO] * (size[0] * size[1]), END] * n)
        strip, sizes = packed(units, side, generator)
        return ids, {"pixel_values_videos": strip, "target_sizes_videos": sizes}

    return {"pictures": pictures, "clips": clips, "video_token_id": VIDEO}


def parts(layers: int) -> dict[str, Any]:
    """Configurations of the tower, which merges after its first layer, and of the decoder."""
    vision: dict[str, Any] = tower_sizes(num_hidden_layers=2, image_size=32)
    text: dict[str, Any] = {"model_type": "qwen3_5_text", **hybrid(layers)}
    return {"vision_config": vision, "text_config": text, "insert_layer_id": 0, "tie_word_embeddings": False, **IDS}


def minicpmv4_6(layers: int = 4, seed: int = 0) -> TinyVLM:
    """MiniCPM-V 4.6: 2 to 20 tokens an image in up to five pieces, three layers of linear attention to one."""
    config = MiniCPMV4_6Config(**parts(layers))
    kind = MiniCPMV4_6ForConditionalGeneration
    return tiny_model("minicpmv4_6", kind, config, seed=seed, slow="A_log", **media(4))


def minicpmv4_7(layers: int = 4, seed: int = 0) -> TinyVLM:
    """MiniCPM-V 4.7: MiniCPM-V 4.6 with multimodal rope that lays slices and their markers on one canvas."""
    markers: dict[str, Any] = {
        "image_start_id": START,
        "image_end_id": END,
        "slice_start_id": TILE,
        "slice_end_id": TILE_END,
    }
    config = MiniCPMV4_7Config(**parts(layers), **markers, newline_id=NEWLINE)
    both: dict[str, Any] = media(4) | {"token_types": "mm_token_type_ids"}
    kind = MiniCPMV4_7ForConditionalGeneration
    return tiny_model("minicpmv4_7", kind, config, seed=seed, slow="A_log", **both)


def minicpm_ocr(layers: int = 4, seed: int = 0) -> TinyVLM:
    """MiniCPM-OCR: MiniCPM-V 4.6 without the merger within its tower, four times the tokens."""
    config = MiniCPMOcrConfig(**parts(layers))
    kind = MiniCPMOcrForConditionalGeneration
    return tiny_model("minicpm_ocr", kind, config, seed=seed, slow="A_log", **media(2))
