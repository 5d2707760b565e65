"""What inputs tell of the rows and columns of tokens, whatever they call it, and what is done where they do not."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.small import long
from vlmrewrite.hf import Sizes, encode_images, encoded_images, grids, learned_queries
from vlmrewrite.passes import DAPE
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import ZOO, Row

ROWS = [Row(1, 3, 2), Row(2, 1, 3)]

TOLD = {
    "gemma4": [[1, 2], [2, 3], [2, 1]],
    "lfm2_vl": None,
    "lighton_ocr": [[2, 2], [3, 3], [2, 3]],
    "mistral3": [[2, 2], [3, 3], [2, 3]],
    "muse_glimmer": [[2, 2], [3, 2], [2, 4]],
    "nemotron_h_omni": [[1, 2], [2, 3], [2, 2]],
    "qwen2_5_vl": None,
}
"""Rows and columns of the three images, where all have one tile and the pixels are the grid's."""

UNTOLD = {
    "emu3": r"the image grids \[\[1, 8, 8\], .* do not account for images of \[6, 12, 8\] tokens",
    "hunyuan_vl": r"the image grids \[\[1, 4, 4\], .* do not account for images of \[8, 11, 12\] tokens",
    **dict.fromkeys(["blip_2", "instructblip"], "an image has 4 tokens, as many as the model has learned queries"),
    "llava_next": "an image has 14 tokens, which is not a square grid of the tower's 2 x 2 patches",
}
"""Tokens that end each row; tiles with a small picture of the whole in front."""


def found(name: str) -> Tensor | str:
    tiny = ZOO[name](layers=1)
    inputs = tiny.inputs(ROWS)
    with torch.no_grad():
        image = encoded_images(encode_images(tiny.model, dict(inputs))["mm_encoder_outputs"]["image"])
    lengths, told = next(iter(image.lengths.values())), Sizes.of(inputs).of_images()
    return grids(tiny.model.config, lengths, told, queries=learned_queries(tiny.model))


@pytest.mark.parametrize("name", TOLD)
def test_grids_that_are_told(name: str) -> None:
    grid = found(name)
    assert isinstance(grid, Tensor), grid
    if TOLD[name] is not None:
        assert grid.tolist() == TOLD[name]


@pytest.mark.parametrize("name", UNTOLD)
def test_grids_that_are_not_told(name: str) -> None:
    reason = found(name)
    assert isinstance(reason, str)
    assert re.match(UNTOLD[name], reason), reason


@pytest.mark.parametrize(
    ("name", "table", "queries"),
    [
        ("gemma3", nn.Parameter(torch.ones(9, 8)), True),
        ("internvl", nn.Parameter(torch.ones(1, 4, 8)), True),
        ("qwen2_5_vl", nn.Parameter(torch.ones(6, 8)), True),
        ("gemma3", nn.Parameter(torch.ones(2, 9, 8)), False),
        ("gemma3", nn.Linear(8, 9), False),
        ("llava", nn.Parameter(torch.ones(16, 8)), False),
    ],
)
def test_tables_of_as_many_rows_as_an_image_has_tokens(name: str, table: Any, queries: bool) -> None:
    """Those that a module holds itself, and that are not the positions of its patches, are learned queries."""
    tiny = ZOO[name](layers=1)
    tiny.model.base_model.table = table
    inputs = tiny.inputs(ROWS)
    with torch.no_grad():
        image = encoded_images(encode_images(tiny.model, dict(inputs))["mm_encoder_outputs"]["image"])
    lengths = next(iter(image.lengths.values()))
    made = grids(tiny.model.config, lengths, Sizes.of(inputs).of_images(), queries=learned_queries(tiny.model))
    assert isinstance(made, str) == queries, (lengths, made)
    tiny.model.get_decoder().table = table  # the decoder's are no queries
    del tiny.model.base_model.table
    assert isinstance(grids(tiny.model.config, lengths, Sizes.of(inputs).of_images()), Tensor)
    assert learned_queries(tiny.model) == learned_queries(ZOO[name](layers=1).model)


def test_pixels_that_are_not_those_of_the_image_sizes() -> None:
    sizes, config = torch.tensor([[8, 12], [12, 8]]), SimpleNamespace(vision_config=None)
    padded = Sizes.of({"image_sizes": sizes, "pixel_values": torch.zeros(2, 3, 12, 12)})
    assert grids(config, [6, 6], padded.of_images()).tolist() == [[2, 3], [3, 2]]
    resized = Sizes.of({"image_sizes": sizes, "pixel_values": torch.zeros(2, 3, 16, 16)})
    assert resized.of_images() is None
    tiles = Sizes.of({"image_sizes": sizes, "pixel_values": torch.zeros(2, 5, 3, 12, 12)})
    assert not tiles


def test_patches_that_are_merged_in_several_ways() -> None:
    config, thw = SimpleNamespace(vision_config=None), torch.tensor([[1, 4, 4], [1, 4, 4]])
    assert grids(config, [4, 4], thw).tolist() == [[2, 2], [2, 2]]
    assert "do not account" in grids(config, [4, 16], thw)
    assert "do not account" in grids(config, [4, 8], thw)
    assert "do not account" in grids(config, [4], thw)
    assert "text stands between the tokens of some of the 2 images" in grids(config, [2, 2, 4], thw)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma4", "lfm2_vl", "lighton_ocr", "muse_glimmer"] if long() else ["gemma4"])
def test_regions_of_grids_that_are_told(name: str) -> None:
    tiny = ZOO[name](layers=3)
    batches = [[*ROWS, Row(0, 4, 1)]]
    if tiny.clips is not None:
        batches.append([Row(0, 2, 2, videos=1), Row(2, 1, 3, videos=1), Row(0, 4, 1)])
    for rows in batches:
        inputs = tiny.inputs(rows)
        if rows is batches[0] or long():
            forward_agreement(tiny.model, inputs, DAPE(budget=0.6)).check()
        generation_agreement(tiny.model, inputs, DAPE(budget=0.6), 3).check()


def test_regions_of_rows_that_text_cuts_are_refused() -> None:
    tiny = ZOO["mistral3"](layers=3)
    with pytest.raises(ValueError, match=r"was refused: .* text stands between the tokens of some of the 3 images"):
        forward_agreement(tiny.model, tiny.inputs(ROWS), DAPE(budget=0.6))
