"""The tiny models of a third of the zoo are sane, and a padded batch is its rows."""

from __future__ import annotations

import pytest

from tests.models import zoo as checks
from tests.models import zoo_joined as joined
from vlmrewrite.testing.models import ZOO
from vlmrewrite.testing.models.gemmas import ABSENT as NO_GEMMAS
from vlmrewrite.testing.models.pixtrals import ABSENT as NO_PIXTRALS

NAMES = """
gemma3n gemma4 gemma4_moe gemma4_unified paligemma paligemma_gemma2
granite4_vision granite_docling
cohere_compass lfm3_vl
llava_next_video llava_onevision video_llava vipllava
lighton_ocr llava_pixtral mistral3 mistral3_mistral4 mistral_large4
aya_vision cohere2_vision idefics2 idefics3 lfm2_vl llama4
deepseek_vl deepseek_vl_hybrid fast_vlm got_ocr2 perception_lm
""".split()
VIDEOS = """
gemma4 gemma4_moe gemma4_unified cohere_compass lfm3_vl llava_next_video llava_onevision video_llava perception_lm
""".split()
names = pytest.mark.parametrize("name", NAMES)

# Their q grow with the index of a token: in a plain forward, padding counts; in Llama 4, in generate() too.
COUNTS_PADDING = {"llama4", "mistral3_mistral4", "mistral_large4"}
GENERATE_COUNTS_PADDING = {"llama4"}


@names
def test_same_seed_same_model(name: str) -> None:
    checks.check_same_seed_same_model(name)


@names
@pytest.mark.parametrize("layers", [2, 3])
def test_other_depths(name: str, layers: int) -> None:
    checks.check_depth(name, layers)


@names
def test_sane_and_looks(name: str) -> None:
    checks.check_sane_and_looks(name)


@names
def test_rows_alone(name: str) -> None:
    joined.check_rows_alone(name, as_padded=name in COUNTS_PADDING)


@pytest.mark.wide
@names
def test_generation(name: str) -> None:
    joined.check_generation(name, as_padded=name in GENERATE_COUNTS_PADDING)


def test_videos() -> None:
    assert {name for name in NAMES if checks.build(name).clips} == {*VIDEOS}
    with pytest.raises(ValueError, match="vipllava takes no videos; expected videos=0 in each row"):
        checks.build("vipllava").inputs(joined.MIXED)


def test_none_is_absent_and_there() -> None:
    assert not {*NO_GEMMAS, *NO_PIXTRALS} & {*ZOO}
