"""The README's own code runs."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch

import vlmrewrite as vr
from vlmrewrite.recipe import shipped_recipes
from vlmrewrite.testing.models import FAMILIES, Row

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^( *)```(\w*)\n(.*?)^ *```", README, re.DOTALL | re.MULTILINE)
PYTHON = [textwrap.dedent(code) for _, language, code in BLOCKS if language == "python"]
YAML = [textwrap.dedent(code) for _, language, code in BLOCKS if language == "yaml"]


def test_the_ten_line_example_compiles():
    assert len([line for line in PYTHON[0].splitlines() if line]) <= 10
    compile(PYTHON[0], "README.md", "exec")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_pass_of_the_five_steps(llava):
    space: dict[str, object] = {"__name__": __name__}
    for code in PYTHON[1:3]:
        exec(compile(code, "README.md", "exec", dont_inherit=True), space)
    loudest = space["Loudest"]
    inputs = llava.inputs([Row(1), Row(2, 3, 1)], side="left")
    assert "loudest = Vision.select(loudest, keep=3)" in str(
        vr.rewrite(vr.trace(llava.model, inputs), [loudest(keep=3)])
    )
    assert vr.verify(llava.model, inputs, [loudest(keep=3), loudest(keep=2, at=2)]) < 1e-3


def test_the_recipe_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(YAML[0])
    assert vr.Recipe.from_yaml(path).name == "mine"


def test_all_passes_and_recipes_are_listed():
    from vlmrewrite import passes

    for name in [*shipped_recipes(), *(f"{p}(" for p in passes.__all__)]:
        assert f"`{name}" in README


def test_blocks_are_trained_saved_and_loaded(llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = [code for code in PYTHON if "save_blocks" in code]
    inputs = llava.inputs([Row(1)])
    other = FAMILIES["llava"]().model
    space = {"vr": vr, "torch": torch, "model": FAMILIES["llava"]().model, "other_model": other, "inputs": inputs}
    exec(compile(code, "README.md", "exec"), space | {"labels": inputs["input_ids"]})
    assert sorted(p.name for p in (tmp_path / "my-dpvr").iterdir()) == ["blocks.safetensors", "recipe.yaml"]
    assert "dpvr" in vr.report(other).recipe
