"""The tutorials in the documentation do what their pages say."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

import vlmrewrite as vr
from examples.tutorials import aya_vision, pyramiddrop
from examples.tutorials.loudest import Loudest, loudest
from examples.tutorials.pyramiddrop import PyramidDrop
from vlmrewrite.passes import VTW, FastV
from vlmrewrite.plan import Plan, run_passes
from vlmrewrite.recipe import Recipe
from vlmrewrite.testing import FAMILIES, Row, TinyVLM, forward_agreement, generation_agreement

DOCS = Path(__file__).parents[2] / "docs"
BATCH = [Row(images=1), Row(images=2, before=3, after=1), Row(images=0, before=4)]


# --8<-- [start:pass]
def test_the_plan_of_pyramiddrop() -> None:
    plan, _ = run_passes(Plan(32), [PyramidDrop()])
    assert str(plan) == (
        "pyramid = Vision.select(pyramid, keep=0.5) at layer 8\n"
        "pyramid2 = pyramid.select(pyramid, keep=0.25) at layer 16\n"
        "pyramid3 = pyramid2.select(pyramid, keep=0.125) at layer 24\n"
        "layers 0-7     run_on All\n"
        "layers 8-15    run_on Text | pyramid\n"
        "layers 16-23   run_on Text | pyramid2\n"
        "layers 24-31   run_on Text | pyramid3"
    )


def test_pyramiddrop_is_refused_where_nothing_is_left() -> None:
    _, (_, outcome) = run_passes(Plan(32), [VTW(at=4), PyramidDrop()])
    assert outcome.reason == "an earlier pass leaves no vision tokens from layer 8 on"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_pyramiddrop_agrees_with_the_oracle(family: str) -> None:
    tiny = FAMILIES[family](layers=4)
    for passes in ([PyramidDrop()], [FastV(keep=3, at=1), PyramidDrop(drop=0.3, at=(1, 2))]):
        generation_agreement(tiny.model, tiny.inputs(BATCH), passes).check()
        # --8<-- [end:pass]


def test_the_stages_of_pyramiddrop_choose_of_what_is_left(llava: TinyVLM) -> None:
    inputs = llava.inputs([Row(images=1)])
    with torch.no_grad(), vr.applied(llava.model, PyramidDrop()):
        llava.model(**inputs)
        stages = vr.kept_tokens(llava.model)
    assert [int(stage.vision.sum()) for stage in stages] == [16, 8, 4, 2]
    assert all(bool((a.vision | ~b.vision).all()) for a, b in itertools.pairwise(stages))


def test_pyramiddrop_after_nothing_is_left_between_its_stages() -> None:
    plan, (_, outcome) = run_passes(Plan(8), [VTW(at=4), PyramidDrop()])
    assert outcome.reason is None
    assert str(plan) == (
        "pyramid = Vision.select(pyramid, keep=0.5) at layer 2\n"
        "layers 0-1     run_on All\n"
        "layers 2-3     run_on Text | pyramid\n"
        "layers 4-7     run_on Text"
    )


def test_what_the_page_of_the_pass_prints(capsys: pytest.CaptureFixture[str]) -> None:
    pyramiddrop.try_it()
    *listing, number = capsys.readouterr().out.splitlines()
    assert "pyramid2 = pyramid.select(pyramid, keep=0.25) at layer 2" in listing
    assert 0 < float(number) < 2e-5


def test_the_entry_point_and_the_recipe_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (DOCS / "add-a-pass.md").read_text()
    [toml] = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    [yaml] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    group, line = re.fullmatch(r'\[project\.entry-points\."(.*)"\]\n(.*)\n', toml).groups()  # type: ignore[union-attr]
    registered = line.replace('"', "").replace("my_package", "examples.tutorials")
    (info / "entry_points.txt").write_text(f"[{group}]\n{registered}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "pyramid.yaml"
    path.write_text(yaml)
    assert Recipe.load(str(path)).passes == (PyramidDrop(drop=0.5, at=(8, 16, 24)),)


# --8<-- [start:operator]
def test_the_operator_loudest() -> None:
    features = torch.tensor([[1.0, 1.0], [3.0, 4.0], [0.0, 2.0], [2.0, 0.0], [9.0, 9.0]])
    member, lengths = torch.tensor([True, True, True, True, False]), torch.tensor([3, 2])
    arguments = (features, member, lengths, torch.tensor([2, 2]))
    assert loudest(*arguments).tolist() == [False, True, True, True, False]
    torch.library.opcheck(torch.ops.vlm.loudest.default, arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="in Triton's interpreter")
def test_the_kernel_of_loudest() -> None:
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    features = torch.randint(-3, 4, (20, 130), generator=generator).float()  # sums are exact, so ties are ties
    member = torch.rand(20, generator=generator) > 0.3
    arguments = (features, member, torch.tensor([12, 0, 8]), torch.tensor([4, 1, 30]))
    assert torch.equal(torch.ops.vlm_triton.loudest(*arguments), loudest(*arguments))


def test_a_pass_that_goes_by_loudest(llava: TinyVLM) -> None:
    inputs = llava.inputs([Row(1), Row(2, 3, 1)], side="left")
    program = vr.rewrite(vr.trace(llava.model, inputs), [Loudest(keep=3)])
    assert "loudest = Vision.select(loudest, keep=3)" in str(program)
    assert vr.verify(llava.model, inputs, [Loudest(keep=3), Loudest(keep=2, at=2)]) < 1e-3
    forward_agreement(llava.model, llava.inputs(BATCH), [Loudest(keep=3), Loudest(keep=2, at=2)]).check()
    # --8<-- [end:operator]


def test_the_family_works(capsys: pytest.CaptureFixture[str]) -> None:
    aya_vision.try_it()
    assert capsys.readouterr().out.startswith("program: 4 decoder layers, hidden 32, float32; 2 rows of 13 tokens")
    assert "aya_vision" not in FAMILIES
