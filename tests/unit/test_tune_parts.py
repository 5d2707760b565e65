"""Parts of a search: what is refused before it, what fails in it, and what is written behind it."""

from __future__ import annotations

import importlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from vlmrewrite.passes import Stride
from vlmrewrite.recipe import Recipe
from vlmrewrite.tune import check_wish, files
from vlmrewrite.tune.results import Point, Tuned
from vlmrewrite.tune.search import search
from vlmrewrite.tune.space import Drawing, Shape
from vlmrewrite.tune.wish import Wish


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "seed: expected an integer >= 0 and <= 4294967295, got -1"),
        ({"seed": 2**32}, "seed: expected an integer >= 0 and <= 4294967295, got 4294967296"),
        ({"trials": 2.5}, "trials: expected an integer >= 1, got 2.5"),
        ({"batch": True}, "batch: expected an integer >= 1, got True (bool)"),
        ({"held_out": "half"}, "held_out: expected a share of the samples, above 0 and below 1, got 'half' (str)"),
        ({"held_out": float("nan")}, "held_out: expected a share of the samples, above 0 and below 1, got nan"),
        ({"metric": "exat"}, "metric: expected one of auto, exact, "),
        ({"metric": None}, "metric: expected one of auto, exact, "),
    ],
)
def test_what_is_refused_without_a_model(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as e:
        check_wish("flops=0.3", "1%", None, **given)
    assert "\n" not in str(e.value)


def test_a_folder_that_takes_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: Any) -> Any:
        raise PermissionError("read-only")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(ValueError, match=r"in a folder that can be written, got '.*x\.yaml': read-only"):
        files.check_output(tmp_path / "x.yaml")


class Fails:
    """Prompts on which a recipe fails from some batch on, if it keeps less than half."""

    sizes = (16,) * 12

    def __init__(self, first: int) -> None:
        self.first = first

    def effective(self, passes: Any) -> Any:
        return passes

    def shares(self, passes: Any, all_of_them: bool) -> dict[str, float]:
        return {"flops": passes[0].keep / 2, "kv": passes[0].keep}

    def runner(self, passes: Any) -> Any:
        def run(start: int, stop: int) -> list[float]:
            if passes[0].keep < 0.5 and stop > self.first:
                raise RuntimeError("no such kernel")
            return [passes[0].keep] * (16 * (stop - start))

        return run


class Few:
    """A space of strides."""

    def simple(self) -> list[dict[str, Any]]:
        return []

    def draw(self, trial: Any) -> Shape:
        most = trial.suggest_float("most", 0.2, 1.0)
        return Shape(lambda amount: (Stride(keep=max(0.01, amount * most)),))


@pytest.mark.parametrize("first", [0, 3, 9])
def test_what_fails_late_is_dropped(first: int) -> None:
    found, failed = search(Fails(first), Few(), Wish("flops", 0.9), 12, 0, lambda _: None)  # type: ignore[arg-type]
    assert failed
    assert all(": no such kernel" in told for told in failed)
    assert found
    assert all(c.solved.passes[0].keep >= 0.5 for c in found if len(c.kl) > 16 * first)  # type: ignore[attr-defined]


def test_a_pass_that_draws_for_some_amounts_alone() -> None:
    study = optuna.create_study()
    trial = study.ask()
    profile: Any = SimpleNamespace(depth=4, freeze_kl=(), hide_kl=(), key_share=())
    draw = Drawing(trial, profile, "start sts")
    at = draw.share("at")
    study.tell(trial, 1.0)
    assert draw.share("at") == at
    with pytest.raises(RuntimeError, match=r"^pass sts: tuned\(\) drew 'more' for some amounts alone"):
        draw.share("more")


def test_a_control_that_cannot_be_had_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    run: Any = importlib.import_module("vlmrewrite.tune.run")
    monkeypatch.setattr(run, "solve", lambda *_: None)
    space: Any = SimpleNamespace(controls={"stride": Stride}, planned=["stride"], control=lambda _: None)
    mine: Any = SimpleNamespace(cost={"flops": 0.3})
    found, notes = run._controls(space, None, Wish("flops", 0.3), mine, ())
    assert not found
    assert notes == ["no control stride: none costs at most 0.300 of the FLOPs of the decoder's prefill"]


@dataclass(frozen=True)
class Layers:
    """What a profile says."""

    freeze_kl: tuple[float, ...]


def tuned(recipe: Recipe) -> Tuned:
    row: Any = SimpleNamespace(n=1, accuracy=1.0, interval=(0, 1), difference=0.0, difference_interval=(0, 0))
    row.agreement = {"kl": float("inf")}
    held_out: Any = SimpleNamespace(to_dict=lambda: {"rows": [{"agreement": row.agreement}]})
    profile: Any = Layers((float("nan"), 0.1))
    points = (Point(recipe, {"flops": 0.5, "kv": 0.5, "latency": None}, row, on_front=True),)
    tried = ({"kl": float("inf")}, {"kl": 0.5})
    return Tuned(recipe, recipe, "met", (), held_out, points, profile, tried, {"budget": {"flops": 0.5}})


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(name="r", passes=(Stride(keep=0.5),))
    found, path = tuned(recipe), tmp_path / "r.yaml"
    monkeypatch.setattr(files, "page", lambda _: "page")
    told = found.to_dict()
    assert told["tried"] == [{"kl": None}, {"kl": 0.5}]
    assert told["held_out"] == [{"agreement": {"kl": None}}]
    assert told["points"][0]["kl"] is None
    assert told["profile"] == {"freeze_kl": [None, 0.1]}
    (tmp_path / "r.json").write_text("mine")  # since the search began
    with pytest.raises(
        ValueError, match=r"r\.json' is there already: .*; the recipe that was found is Stride\(keep=0\.5"
    ):
        files.write(path, found)
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert (tmp_path / "r.json").read_text() == "mine"
    (tmp_path / "r.json").unlink()
    files.write(path, found)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.json", "r.yaml"]
    assert Recipe.load(path) == recipe
