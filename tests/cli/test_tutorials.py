"""The tutorials in the documentation do what their pages say."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

import vlmrewrite as vr
from examples.tutorials import aya_vision, loud_and_seen, pyramiddrop
from examples.tutorials.checked_options import Between
from examples.tutorials.loud_and_seen import LoudAndSeen, LoudInTheEncoder
from examples.tutorials.loudest import Loudest, loudest
from examples.tutorials.pyramiddrop import PyramidDrop
from examples.tutorials.second_look import SecondLook
from vlmrewrite.passes import VTW, FastV
from vlmrewrite.plan import Plan, Policy, run_passes
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


@pytest.mark.wide
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_pyramiddrop_agrees_with_the_oracle(family: str) -> None:
    tiny = FAMILIES[family](layers=4)
    for passes in ([PyramidDrop()], [FastV(keep=3, at=1), PyramidDrop(drop=0.3, at=(1, 2))]):
        generation_agreement(tiny.model, tiny.inputs(BATCH), passes).check()


def test_the_stages_of_pyramiddrop_choose_of_what_is_left(llava: TinyVLM) -> None:
    inputs = llava.inputs([Row(images=1)])
    with torch.no_grad(), vr.applied(llava.model, PyramidDrop()):
        llava.model(**inputs)
        stages = vr.kept_tokens(llava.model)
    assert [int(stage.vision.sum()) for stage in stages] == [16, 8, 4, 2]
    assert all(bool((a.vision | ~b.vision).all()) for a, b in itertools.pairwise(stages))
    # --8<-- [end:pass]


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


# ---- what the pages show besides


def shown(page: str, language: str, start: str) -> str:
    """The block of a page that starts so."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    [found] = [block for block in blocks if block.startswith(start)]
    return str(found)


def test_an_operator_of_two_inputs_and_an_option(llava: TinyVLM) -> None:
    member, lengths = torch.tensor([True, True, True, True, False]), torch.tensor([3, 2])
    features, attention = torch.tensor([[1.0], [3.0], [2.0], [1.0], [9.0]]), torch.tensor([9.0, 1.0, 2.0, 1.0, 1.0])
    arguments = (features, attention, member, lengths, torch.tensor([2, 2]), 1.0)
    assert loud_and_seen.loud_and_seen(*arguments).tolist() == [True, False, True, True, False]
    torch.library.opcheck(torch.ops.vlm.loud_and_seen.default, arguments)
    passes = [LoudAndSeen(keep=3, at=1, power=0.5)]
    assert vr.verify(llava.model, llava.inputs(BATCH, side="left"), passes) < 1e-4
    assert "loud and seen = Vision.select(loud and seen, keep=3) at layer 1" in str(run_passes(Plan(4), passes)[0])


def test_the_error_that_the_page_of_the_operator_shows() -> None:
    with pytest.raises(ValueError, match="swapped|expected `needs`") as caught:
        Policy("loud and seen", torch.ops.vlm.loud_and_seen, ("attention", "features"), (1.0,))
    printed = " ".join(shown("add-an-operator.md", "text", "policy 'loud and seen'").split())
    start, _, end = printed.partition("...")
    assert str(caught.value).startswith(start) and str(caught.value).endswith(end)


def test_a_need_that_is_not_there() -> None:
    _, (outcome,) = run_passes(Plan(4, refusals={"encoder_features": "nobody saw them"}), [LoudInTheEncoder(keep=3)])
    assert outcome.reason == "policy 'loud' at layer 0 needs 'encoder_features', which is not there: nobody saw them"
    assert run_passes(Plan(4, frozenset({"encoder_features"})), [LoudInTheEncoder(keep=3)], strict=True)


def test_narrow_and_widen(llava: TinyVLM) -> None:
    plan, _ = run_passes(Plan(32), [SecondLook()], strict=True)
    assert f"{plan}\n" == shown("plan.md", "text", "spread = ")
    inputs = llava.inputs(BATCH)
    passes = [SecondLook(keep=3, back=2, at=2)]
    assert vr.verify(llava.model, inputs, passes) < 1e-4
    with torch.no_grad(), vr.applied(llava.model, passes):
        llava.model(**inputs)
        stages = vr.kept_tokens(llava.model)
    assert [stage.vision.sum(1).tolist() for stage in stages] == [[3, 6, 0], [5, 10, 0]]
    assert not bool((stages[0].vision & ~stages[1].vision).any())
    assert vr.verify(llava.model, inputs, SecondLook(keep=1.0)) < 1e-4


def test_options_that_depend_on_one_another() -> None:
    code, error = shown("add-a-pass.md", "text", ">>> Between(").splitlines()
    with pytest.raises(ValueError, match="first below last") as caught:
        eval(code.removeprefix(">>> "), {"Between": Between})
    assert error == f"ValueError: {caught.value}"
    plan, _ = run_passes(Plan(8), [Between(first=2, last=0.5)], strict=True)
    assert str(plan).splitlines()[1] == "layers 2-3     run_on Text, attend_to All"


@pytest.mark.slow
def test_the_testing_kit_as_its_page_prints_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of the page's blocks but the last one after another, and the last one, a file of its own, alone."""
    *first, own = re.findall(r"```python\n(.*?)```", (DOCS / "testing.md").read_text(), re.DOTALL)
    there: dict[str, object] = {}
    for block in first:
        exec(block, there)
    assert len(first) == 3
    printed = capsys.readouterr().out
    assert "All" in printed and "Text | fastv" in printed and "tensor([0, 0])" not in printed
    file = tmp_path / "test_mine.py"
    file.write_text(own)
    assert pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(file)]) == 0
    assert "1 passed" in capsys.readouterr().out


@pytest.mark.slow
def test_the_family_works(capsys: pytest.CaptureFixture[str]) -> None:
    aya_vision.try_it()
    assert capsys.readouterr().out.startswith("program: 4 decoder layers, hidden 32, float32; 2 rows of 13 tokens")
    assert "aya_vision" not in FAMILIES
