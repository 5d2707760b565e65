"""Tiny models of families with multimodal rope and their kin are worth testing with."""

from __future__ import annotations

import pytest

from tests.models import zoo
from vlmrewrite.testing.models import ZOO
from vlmrewrite.testing.models.native import ABSENT

NAMES = """
qwen2_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe qwen4_exp qwen2_5_omni_thinker qwen3_omni_moe_thinker
glm4v glm4v_moe glm46v glmga glm_ocr glm5_next
ernie4_5_vl_moe exaone4_5 hunyuan_vl kimi_k25 minimax_m3_vl paddleocr_vl video_llama_3
cosmos3_edge cosmos3_omni dots3_note step3p7 muse_glimmer muse_spark
minicpmv4_6 minicpmv4_7 minicpm_ocr
""".split()

UNMIXED = {"glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr"}
"""Families whose image and video tokens are the same, so that no call takes both."""

SLOTS = {"minimax_m3_vl"}
"""Families that cut keys into blocks with the padding in front of them: what a token sees depends on it."""

SHIFTED = {"hunyuan_vl"}
"""Families whose prompts of text are placed behind their padding by ``forward``, and it matters where they are."""

IMAGES_ONLY = {"hunyuan_vl", "kimi_k25", "paddleocr_vl", "step3p7"}

family = pytest.mark.parametrize("name", NAMES)


@family
def test_same_seed_same_model(name: str) -> None:
    zoo.check_same_seed_same_model(name)


@family
@pytest.mark.parametrize("layers", [1, 3])
def test_other_depths(name: str, layers: int) -> None:
    zoo.check_depth(name, layers)


@family
def test_sane_and_looks(name: str) -> None:
    zoo.check_sane_and_looks(name, name not in UNMIXED)


@pytest.mark.wide
@family
def test_rows_alone(name: str) -> None:
    zoo.check_rows_alone(name, name not in UNMIXED, side="right" if name in SLOTS | SHIFTED else "left")


@pytest.mark.wide
@family
def test_generation(name: str) -> None:
    zoo.check_generation(name, name not in UNMIXED, alone=name not in SLOTS)


def test_videos() -> None:
    assert {name for name in NAMES if zoo.build(name).clips is None} == IMAGES_ONLY
    with pytest.raises(ValueError, match=r"kimi_k25 takes no videos; expected videos=0 in each row"):
        zoo.build("kimi_k25").inputs(zoo.VIDEOS)


def test_none_is_absent_and_there() -> None:
    assert set(NAMES) <= set(ZOO)
    assert not set(ABSENT) & set(ZOO)
