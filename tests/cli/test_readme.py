"""The code in the README and in the documentation's pages runs, and what they print is what is printed."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import vlmrewrite as vr
from tests.small import CHAIN
from tools import pages
from vlmrewrite import passes
from vlmrewrite.cli import app, prompt
from vlmrewrite.recipe import shipped_recipes
from vlmrewrite.testing.models import FAMILIES, Row

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^( *)```(\w*)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, written, code in found if written == language]


def page(name: str) -> str:
    return (ROOT / "docs" / f"{name}.md").read_text()


@pytest.mark.slow
def test_the_ten_line_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code = blocks(README, "python")[0]
    assert len([line for line in code.splitlines() if line]) <= 10
    space: dict[str, object] = {"__name__": __name__}
    exec(compile(code, "README.md", "exec", dont_inherit=True), space)
    answer, *report = capsys.readouterr().out.splitlines()
    assert answer.strip().startswith(space["scene"].question)
    assert any("repulsion" in line for line in report)
    with pytest.raises(ValueError, match="is not rewritten"):
        vr.report(space["model"])
    assert 0 < vr.verify(space["model"], space["inputs"], "sts-half") < 1e-5  # as the README says of it


@pytest.fixture(scope="module")
def inspected():
    """What `inspect` prints; the pages are made from the model that it captured."""
    capture, made = prompt.captured_prompt, []

    def captured_once(*arguments):
        made.extend([] if made else [capture(*arguments)])
        return made[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt, "captured_prompt", captured_once)
        command = ["inspect", str(pages.CONFIG), "--recipe", "sts-128"]
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0
        yield done.stdout
        pages.captured.cache_clear()


@pytest.mark.slow
def test_before_and_after(inspected):
    [listing] = [block for block in blocks(README, "") if block.startswith("program:")]
    assert f"\n\n{listing}\n" in inspected
    before, _, after = listing.split("\n\n")
    assert pages.unmodified() == pages.listing(before)
    assert pages.listing(after.strip()) in pages.technique(passes.STS, [passes.STS(keep=192, refine=64)])


def test_the_plans_of_a_dispatch_are_shown(inspected):
    text = pages.technique(passes.VISOR, [pages.shown()["visor"][1]])
    assert "dispatch by Confidence(at=0, threshold=0.8) at layer 0 among\nvariant 0:\n" in text
    assert text.count("\nvariant ") == 3
    assert "**Source.** arXiv 2603.23495" in text


def test_the_recipe_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(blocks(page("recipes"), "yaml")[0])
    assert vr.Recipe.from_yaml(path).name == "mine"


def test_all_passes_and_recipes_are_listed():
    for name in [*shipped_recipes(), *(f"{p}(" for p in passes.__all__)]:
        assert f"`{name}" in README


def test_blocks_are_trained_saved_and_loaded(llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = [code for code in blocks(page("training"), "python") if "save_blocks" in code]
    inputs = llava.inputs([Row(1)])
    other = FAMILIES["llava"]().model
    space = {"vr": vr, "torch": torch, "model": FAMILIES["llava"]().model, "other_model": other, "inputs": inputs}
    exec(compile(code, "training.md", "exec"), space | {"labels": inputs["input_ids"]})
    found = sorted(p.name for p in (tmp_path / "my-dpvr").iterdir())
    assert found == ["vlmrewrite.json", "vlmrewrite_blocks.safetensors"]
    assert "dpvr" in vr.report(other).recipe


@pytest.mark.parametrize("technique", ["DAPE", "VISOR"])
def test_other_blocks_are_trained(technique):
    [code] = [code for code in blocks(page("training"), "python") if f"import {technique}" in code]
    tiny = FAMILIES["llava"]()
    inputs = tiny.inputs([Row(1), Row(2)])
    given = {"labels": inputs["input_ids"], "cheapest": torch.tensor([0, 1])}
    before = {name for name, _ in tiny.model.named_parameters()}
    exec(
        compile(code, "training.md", "exec"), {"vr": vr, "torch": torch, "model": tiny.model, "inputs": inputs, **given}
    )
    learned = {name: p for name, p in tiny.model.named_parameters() if name not in before}
    assert {name for name, p in tiny.model.named_parameters() if p.requires_grad} == set(learned)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in learned.values())


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize(
    "technique",
    [passes.DAPE(budget=0.5, matching="learned"), passes.VISOR(policy="router", chain=CHAIN)],
    ids=lambda p: p.name,
)
def test_the_loop_is_the_same_for_other_blocks(technique, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    [code] = [code for code in blocks(page("training"), "python") if "save_blocks" in code]
    tiny, other = FAMILIES["llava"](), FAMILIES["llava"]().model
    inputs = tiny.inputs([Row(1), Row(2)])
    labels = inputs["input_ids"].clone()
    labels[:, :-1] = -100
    space = {"vr": vr, "torch": torch, "model": tiny.model, "other_model": other, "inputs": inputs, "labels": labels}
    exec(compile(code.replace('"dpvr"', "recipe"), "training.md", "exec"), space | {"recipe": [technique]})
    learned = dict(vr.trainable_blocks(tiny.model).named_parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in learned.values())
    assert all(torch.equal(p, learned[n]) for n, p in vr.trainable_blocks(other).named_parameters())
