"""Builders of models that look at crops, codes of images, queries, pages, and of those that hear."""

from __future__ import annotations

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from tests.models import zoo
from vlmrewrite.testing.models import ZOO
from vlmrewrite.testing.models.absent import ABSENT

NAMES = (
    "aria blip_2 chameleon deepseek_ocr2 emu3 fuyu hyperclovax_vision_v2 inkling2 inkling_mm_model instructblip "
    "instructblipvideo janus kosmos_2 kosmos_2_5 molmo2 nemotron_h_omni ovis2 phi4_multimodal pp_chart2table "
    "qianfan_ocr unlimited_ocr"
).split()
SEEING = {"blip_2", "instructblip", "instructblipvideo", "kosmos_2"}
"""Without an image, forward refuses."""

ONE_KIND = {"instructblipvideo", "molmo2"}
"""Images or videos, never both in one call."""

BY_LENGTH = {"inkling_mm_model", "kosmos_2", "kosmos_2_5"}
"""Positions of new tokens count the padding: a padded row goes on differently."""

SCALED = {"inkling2", "inkling_mm_model"}
"""Layers without a window scale queries by the position, which counts the padding unless it is given."""

names = pytest.mark.parametrize("name", NAMES)


@names
def test_same_seed_same_model(name: str) -> None:
    zoo.check_same_seed_same_model(name)


@names
def test_is_sane_and_looks(name: str) -> None:
    zoo.check_sane_and_looks(name, mixed=name not in ONE_KIND)


@names
def test_rows_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in SCALED:
        monkeypatch.setattr(zoo.build(name).model.config.text_config, "log_scaling_n_floor", 512)
    zoo.check_rows_alone(name, mixed=name not in ONE_KIND, text=name not in SEEING)


@pytest.mark.wide
@names
def test_generation(name: str) -> None:
    zoo.check_generation(name, name not in ONE_KIND, name not in SEEING, alone=name not in BY_LENGTH)


def test_a_family_without_a_builder_is_one_of_transformers() -> None:
    assert set(ABSENT) <= set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    assert not {name.replace("-", "_").replace(".", "_") for name in ABSENT} & set(ZOO)
