"""Builders of models that look at crops, codes of images, queries, pages, and of those that hear."""

from __future__ import annotations

import pytest

from tests.models import test_zoo as zoo

NAMES = (
    "aria blip_2 chameleon deepseek_ocr2 emu3 fuyu instructblip instructblipvideo janus kosmos2 kosmos2_5 molmo2 ovis2 "
    "pp_chart2table qianfan_ocr unlimited_ocr"
).split()
SEEING = {"blip_2", "instructblip", "instructblipvideo", "kosmos2"}
"""Without an image, forward refuses."""

ONE_KIND = {"molmo2", "instructblipvideo"}
"""Images or videos, never both in one call."""

BY_LENGTH = {"kosmos2", "kosmos2_5"}
"""Positions of new tokens count the padding: a padded row goes on differently."""

names = pytest.mark.parametrize("name", NAMES)


@names
def test_same_seed_same_model(name: str) -> None:
    zoo.check_same_seed_same_model(name)


@names
def test_is_sane_and_looks(name: str) -> None:
    zoo.check_sane_and_looks(name, mixed=name not in ONE_KIND)


@names
def test_rows_alone(name: str) -> None:
    zoo.check_rows_alone(name, mixed=name not in ONE_KIND, text=name not in SEEING)


@names
def test_generation(name: str) -> None:
    zoo.check_generation(name, name not in ONE_KIND, name not in SEEING, alone=name not in BY_LENGTH)
