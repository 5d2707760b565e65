"""Tiny models of families with multimodal rope and their kin are worth testing with."""

from __future__ import annotations

import pytest

from tests.models import test_zoo as zoo

NAMES = [
    *("qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen4_exp"),
    *("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "cosmos3_edge", "cosmos3_omni"),
    *("dots3_note", "glm5_next", "step3p7", "muse_glimmer", "muse_spark"),
    *("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"),
    *("glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr"),
    *("ernie4_5_vl_moe", "exaone4_5", "hunyuan_vl", "kimi_k25", "minimax_m3_vl", "paddleocr_vl", "video_llama_3"),
]

UNMIXED = {"glm4v", "glm4v_moe", "glm46v", "glmga", "glm_ocr"}
"""Families whose image and video tokens are the same, so that no call takes both."""

SLOTS = {"minimax_m3_vl"}
"""Families that count keys with the padding in front of them, as in blocks of keys: padding there changes the rest."""

SHIFTED = {"hunyuan_vl"}
"""Families whose prompts of text, without position ids, are placed behind their padding, and it matters where."""

family = pytest.mark.parametrize("name", NAMES)


@family
def test_same_seed_same_model(name: str) -> None:
    zoo.check_same_seed_same_model(name)


@family
def test_sane_and_looks(name: str) -> None:
    zoo.check_sane_and_looks(name, name not in UNMIXED)


@family
def test_rows_alone(name: str) -> None:
    zoo.check_rows_alone(name, name not in UNMIXED, "right" if name in SLOTS | SHIFTED else "left")


@family
def test_generation(name: str) -> None:
    zoo.check_generation(name, name not in UNMIXED, name not in SLOTS)
