"""`vlmrewrite tune` and `vr.tune` on the bundled model: what is found, files, bad input; `apply(model, "auto")`."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import vlmrewrite as vr
from examples.digits.model import CHECKPOINT, encode
from examples.digits.scenes import held_out_questions
from vlmrewrite.cli import app
from vlmrewrite.tune import Prompts, Space, Tuned, solve
from vlmrewrite.tune.wish import Wish

pytestmark = pytest.mark.filterwarnings("ignore:.* samples. intervals are wide", "ignore:calibration. ")
RUN: Any = importlib.import_module("vlmrewrite.tune.run")
AUTO: Any = importlib.import_module("vlmrewrite.tune.auto")
OPTIONS: dict[str, Any] = {"trials": 14, "batch": 8, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty-two questions as a user would have them."""
    folder, rows = tmp_path_factory.mktemp("calibration"), []
    for i, asked in enumerate(held_out_questions(32, 77)):
        asked.image.save(folder / f"{i}.png")
        rows.append(json.dumps({"image": f"{i}.png", "prompt": asked.question, "answer": asked.answer}))
    (folder / "calib.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "calib.jsonl"


@pytest.fixture(scope="module")
def prompts(digits: Any) -> Prompts:
    model, processor = digits
    return Prompts(model, [dict(encode(processor, held_out_questions(8, 77)))])


@pytest.fixture(scope="module")
def found(digits: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuned, Path]:
    path, stages = tmp_path_factory.mktemp("tuned") / "recipe.yaml", list[str]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RUN, "FINALISTS", 2)
        patch.setattr(RUN, "_OTHER", (1.5,))
        tuned = vr.tune(
            *digits, data, "flops=0.4", 0.5, output=path, progress=lambda stage, *_: stages.append(stage), **OPTIONS
        )
    assert list(dict.fromkeys(stages)) == ["prompts", "profile", "candidates", "answers", "held out"]
    return tuned, path


@pytest.mark.slow
def test_the_recipe_keeps_to_its_budget(digits: Any, found: tuple[Tuned, Path]) -> None:
    tuned, path = found
    assert tuned.met
    assert tuned.recipe is not None
    recipe = vr.Recipe.load(path)
    assert recipe == tuned.recipe
    model, processor = digits
    with vr.applied(model, recipe):
        model.generate(**encode(processor, held_out_questions(8, 5)), max_new_tokens=1)
        totals = vr.report(model).totals
    assert 0.2 < totals["after"]["flops"] / totals["before"]["flops"] <= 0.4
    assert recipe.name == "tuned-flops-0.4"
    assert recipe.description == tuned.verdict


def test_nothing_that_ran_cost_more(found: tuple[Tuned, Path]) -> None:
    tuned, _ = found
    assert len(tuned.tried) >= 8
    assert all(x["flops"] <= 0.4 for x in tuned.tried)
    whole = [x["kl"] for x in tuned.tried if x["n"] == 16]
    assert whole == sorted(whole)


def test_what_is_written(found: tuple[Tuned, Path], data: Path) -> None:
    tuned, path = found
    told = json.loads(path.with_suffix(".json").read_text())
    assert told == tuned.to_dict()
    assert {"front", "provenance"} <= told.keys()
    about = told["provenance"]
    assert (about["samples"], about["searched"], about["held_out"], about["seed"]) == (32, 16, 16, 0)
    assert about["budget"] == {"flops": 0.4}
    assert {"vlmrewrite", "torch", "transformers", "optuna", "python"} == about["versions"].keys()
    assert about["model"]["class"] == "LlavaForConditionalGeneration"
    assert about["score"]["accuracy"] == next(
        r["accuracy"] for r in told["held_out"] if r["recipe"] in tuned.verdict.split(" costs ")[0]
    )
    rows = [row["recipe"] for row in told["held_out"]]
    assert rows[0] == "unmodified"
    assert {"random", "stride"} <= {*rows, tuned.best.passes[0].name}
    assert all(row["flops"] <= 0.4 for row in told["held_out"][1:])
    page = path.with_suffix(".html").read_text()
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "")
    assert not [*path.parent.glob(".*")]
    costs = [p.cost["flops"] for p in tuned.points]
    assert costs == sorted(costs)  # type: ignore[type-var]
    assert tuned.front
    assert str(tuned).endswith(tuned.verdict)
    assert sum("intervals are wide" in note for note in tuned.notes) == 1
    assert any("no control of smaller pictures: " in note and "doesn't match" in note for note in tuned.notes)


@pytest.mark.slow
def test_the_same_seed_finds_the_same(prompts: Prompts) -> None:
    def passes(seed: int) -> list[str]:
        _, found, failed = RUN.candidates(prompts, Wish("flops", 0.4), 8, seed, lambda *_: None)
        assert not failed
        return [repr(c.solved.passes) for c in found]

    assert passes(0) == passes(0) != passes(1)


@pytest.mark.slow
def test_what_fails_is_told(prompts: Prompts, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(self: Any, passes: Any) -> Any:
        if "DivPrune" in repr(passes):
            raise RuntimeError("no such kernel")
        return runner(self, passes)

    runner = Prompts.runner
    monkeypatch.setattr(Prompts, "runner", failing)
    _, found, [told] = RUN.candidates(prompts, Wish("flops", 0.4), 4, 0, lambda *_: None)
    assert re.match(r"\d+ recipes that were drawn failed, such as \(.*DivPrune\(.*: no such kernel$", told)
    assert found
    assert not any("DivPrune" in repr(c.solved.passes) for c in found)


@pytest.mark.slow
def test_the_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RUN, "_OTHER", ())
    path = tmp_path / "recipe.yaml"
    asked = ["tune", CHECKPOINT, "--data", data, "--output", path, "--trials", 2, "--max-new-tokens", 4, "--limit", 8]
    done = CliRunner().invoke(app, [*map(str, asked), "--budget", "kv=0.05", "--max-drop", "0%"])
    assert done.exit_code == 1, done.output
    assert "nothing meets it. Nearest: " in " ".join(done.stdout.split())
    assert not path.exists()
    told = json.loads(path.with_suffix(".json").read_text())
    assert (told["met"], told["recipe"]) == (False, None)
    assert told["best"]["passes"]
    assert "does not meet the wish" in path.with_suffix(".html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "flops=2"], "budget flops: expected a share of the unmodified model's FLOPs"),
        (["--budget", "time=0.2"], "budget: unknown kind 'time', expected one of flops, kv, latency"),
        (["--budget", "flops=0.5", "--max-drop", "few"], "--max-drop: expected a share such as 1% or 0.01, or any"),
        (["--budget", "flops=0.5", "--output", "x.txt"], "output: expected a file that ends in .yaml, got 'x.txt'"),
        (["--budget", "flops=0.5", "--output", "no/x.yaml"], "output: expected a file in a folder that exists"),
        (["--budget", "flops=0.5", "--seed", "-1"], "seed: expected an integer >= 0 and <= 4294967295, got -1"),
        (
            ["--budget", "flops=0.5", "--held-out", "2"],
            "held_out: expected a share of the samples, above 0 and below 1",
        ),
        (["--budget", "flops=0.5", "--metric", "exat"], "metric: expected one of auto, exact, "),
        (["--budget", "flops=0.5", "--trials", "0"], "--trials: expected at least 1, got 0"),
    ],
)
def test_a_line_each(data: Path, options: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["tune", str(CHECKPOINT), "--data", str(data), *options])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_budget_that_no_recipe_can_meet(digits: Any, data: Path) -> None:
    with pytest.raises(ValueError, match=r"^budget kv=0.001: no recipe can meet it, .* cost 0\.0\d+ of") as e:
        vr.tune(*digits, data, "kv=0.001", **OPTIONS)
    assert "\n" not in str(e.value)


@pytest.mark.slow
def test_a_recipe_that_was_measured_says_with_what(digits: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RUN, "_OTHER", ())
    monkeypatch.setattr(RUN, "FINALISTS", 1)
    lines = [json.loads(line) for line in data.read_text().splitlines()[:8]]
    rows = [line | {"image": str(data.parent / line["image"])} for line in lines]
    found = vr.tune(*digits, rows, "latency=0.9", "any", **OPTIONS | {"trials": 2, "max_new_tokens": 1})
    assert (found.best.backend, found.best.kernels) == ("eager", "reference")


def test_files_that_are_there_stay(digits: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "x.html").write_text("mine")
    with pytest.raises(ValueError, match=r"x\.html' is there already: expected another name"):
        vr.tune(*digits, data, "flops=0.5", output=tmp_path / "x.yaml")
    assert (tmp_path / "x.html").read_text() == "mine"


def test_data_without_images(digits: Any) -> None:
    with pytest.raises(ValueError, match="expected an 'image' or 'images', got none"):
        vr.tune(*digits, [{"prompt": "what", "answer": "4"}], "flops=0.5")


def test_a_damaged_picture(digits: Any, tmp_path: Path) -> None:
    first, second = (record.image for record in held_out_questions(2))
    first.save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-300])  # looks whole until it is read
    pictures = {"half": tmp_path / "half.jpg", "whole": second}
    rows = [{"id": name, "prompt": "what", "answer": "4", "image": image} for name, image in pictures.items()]
    with pytest.raises(ValueError, match=r"^sample 'half' cannot be asked: OSError: .*truncated"):
        vr.tune(*digits, rows, "flops=0.5")


def test_few_samples(digits: Any, data: Path) -> None:
    lines = data.read_text().splitlines()[:2]
    rows = [json.loads(line) | {"image": str(data.parent / f"{i}.png")} for i, line in enumerate(lines)]
    with (
        pytest.warns(UserWarning, match="^2 samples: intervals are wide below 30$"),
        pytest.raises(ValueError, match="no recipe"),
    ):
        vr.tune(*digits, rows, "flops=0.001")


def test_without_optuna(digits: Any, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'vlmrewrite[tune]'")):
        vr.tune(*digits, data, "flops=0.5")


@pytest.mark.slow
def test_kl_is_that_of_what_apply_does(digits: Any, prompts: Prompts) -> None:
    model, processor = digits
    space = Space(prompts.profile(1))
    stride = solve(space.control("stride"), prompts, "flops", 0.3)
    assert stride is not None
    [kl] = [sum(prompts.runner(stride.passes)(0, 1)) / 8]
    rows = [{"image": r.image, "prompt": r.question} for r in held_out_questions(8, 77)]
    done = vr.evaluate(model, processor, rows, vr.Recipe(name="r", passes=stride.passes), max_new_tokens=4)
    assert done.rows[1].agreement["kl"] == pytest.approx(kl, rel=1e-4)
    assert done.rows[1].flops == pytest.approx(stride.shares["flops"])
    assert done.rows[1].kv == pytest.approx(stride.shares["kv"])


@pytest.mark.slow
def test_auto_by_kl(digits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AUTO, "TRIALS", 4)
    model, processor = digits
    batches = [dict(encode(processor, held_out_questions(8, seed))) for seed in (1, 2)]
    vr.apply(model, "auto", calibration=batches, budget={"flops": 0.4})
    try:
        model.generate(**batches[0], max_new_tokens=1)
        told = vr.report(model)
    finally:
        vr.restore(model)
    assert 0.2 < told.totals["after"]["flops"] / told.totals["before"]["flops"] <= 0.4
    assert told.recipe == "auto-flops-0.4"


def test_auto_by_answers(digits: Any, data: Path, found: tuple[Tuned, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = digits
    asked = list[Any]()
    monkeypatch.setattr(AUTO, "tune", lambda *given, **_: asked.append(given) or found[0])
    with vr.applied(model, "auto", calibration=(processor, data)):
        assert "tuned-flops-0.4" in str(vr.report(model))
    assert asked == [(model, processor, data, {"flops": 0.5}, None)]


@pytest.mark.parametrize(
    ("recipe", "given", "message"),
    [
        ("auto", {}, "the recipe 'auto' is searched: expected calibration=(processor, data)"),
        ("auto", {"calibration": 3}, "calibration: expected calibration=(processor, data)"),
        ("auto", {"calibration": []}, "calibration: expected calibration=(processor, data)"),
        ("sts-half", {"budget": "flops=0.5"}, "expected calibration and budget with the recipe 'auto' alone"),
    ],
)
def test_auto_with_what_it_cannot_use(digits: Any, recipe: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        vr.apply(digits[0], recipe, **given)
