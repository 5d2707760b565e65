"""No file but the builders of tiny models names a family of models: what the others do goes by structure."""

from __future__ import annotations

import importlib
import pkgutil
import re

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPING

from tests.unit.test_house import ROOT, name_of, sources
from vlmrewrite.testing import models

ORDINARY = {
    "diffusion": "a kind of model",
    "dots": "of a drawing, or of a dotted name",
    "fast": "what is quick",
    "git": "the version control system",
    "got": "what came, in messages: expected ... got ...",
    "perception": "seeing",
    "pi": "the number",
    "pix": "of pixels",
    "pp": "two letters",
    "step": "one of many",
    "t": "a letter",
    "unlimited": "without a bound",
    "video": "a series of frames",
    "vision": "seeing",
}
"""Words that names of families begin with, and that mean something without them."""

HEADS = re.compile(r"(For[A-Z]\w*|Model|Reasoning_V3)$")
"""What class names have behind the family."""

NAMED = {
    # Sizes at which the kernels are measured, as tables show them: those of published models.
    "vlmrewrite/bench/kernels/cases.py": {"llava-1.5", "llava-next", "qwen2.5-vl", "qwen2.5-vl-16k"},
}
"""Where a family is named nevertheless, and how. It can only shrink."""


def names() -> set[str]:
    """Of all families that have a builder, are said to have none, or are in transformers, in small letters."""
    found = set(models.ZOO) | set(MAPPING) | {HEADS.sub("", name).strip("_") for name in MAPPING.values()}
    for module in pkgutil.iter_modules(models.__path__, f"{models.__name__}."):
        found |= set(getattr(importlib.import_module(module.name), "ABSENT", ()))
    return {name.lower() for name in found}


def families() -> re.Pattern[str]:
    """Names of families as words, however their parts are joined, and the first words of them, whatever is behind.

    ``qwen2_5_vl`` is found as ``qwen2_5_vl``, ``Qwen2.5-VL`` and ``Qwen2_5_VLConfig``; ``qwen`` also as ``Qwen7``.
    """
    whole = {"[-_. ]?".join(re.findall(r"[a-z]+|\d+", name)) for name in names() - ORDINARY.keys()}
    first = {word[0] for name in names() if (word := re.match("[a-z]+", name))} - ORDINARY.keys()
    either = "|".join(sorted(whole | first, key=lambda x: (-len(x), x)))
    return re.compile(rf"(?:(?<![A-Za-z])|(?<=[a-z])(?=[A-Z]))(?i:{either})(?:(?![A-Za-z])|(?=[A-Z]))[-\w.]*(?<![.-])")


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ('if config.model_type == "qwen2_5_vl":', ["qwen2_5_vl"]),
        ("Qwen2.5-VL, like LLaVA-NeXT.", ["Qwen2.5-VL", "LLaVA-NeXT"]),
        ("class TinyHunYuanVLConfig(Qwen2Config):", ["HunYuanVLConfig", "Qwen2Config"]),
        ("from transformers import NemotronH_Omni_Reasoning_V3", ["NemotronH_Omni_Reasoning_V3"]),
        ("is_gemma3n(x), step3p7, Step-3p7", ["gemma3n", "step3p7", "Step-3p7"]),
        ("fast_vlm and PI0 and got_ocr2", ["fast_vlm", "PI0", "got_ocr2"]),
        ("a decode step got 3 video frames; a variable, git; canvas, ovise, an ayah, gitter, emulate", []),
    ],
)
def test_the_names_that_are_looked_for(text: str, hits: list[str]) -> None:
    assert families().findall(text) == hits


def test_ordinary_words_begin_names() -> None:
    assert {word for word in ORDINARY if not any(name.startswith(word) for name in names())} == set()


def test_no_family_is_named_outside_the_builders() -> None:
    pattern = families()
    files = [path for path in sources("vlmrewrite", "passes") if "testing/models/" not in name_of(path)]
    files += (ROOT / "recipes").rglob("*.yaml")
    assert len(files) > 150
    found = {name_of(path): set(pattern.findall(path.read_text())) for path in files}
    assert {name: words for name, words in found.items() if words} == NAMED
