"""Budgets and largest drops as users write them, samples split in two, and who is best."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from vlmrewrite.evaluate import Evaluation, Row, Sample, pareto
from vlmrewrite.passes import Stride
from vlmrewrite.recipe import Recipe
from vlmrewrite.tune.judge import best, preferred, taken, verdict, with_front
from vlmrewrite.tune.results import Point
from vlmrewrite.tune.search import rungs
from vlmrewrite.tune.space import Shape, solve, spread
from vlmrewrite.tune.split import split
from vlmrewrite.tune.wish import Wish


@pytest.mark.parametrize("given", ["flops=0.3", " flops = .3 ", {"flops": 0.3}])
def test_a_budget(given: Any) -> None:
    assert Wish.of(given, 0.01) == Wish("flops", 0.3, 0.01)
    assert str(Wish.of(given, 0.01)) == "flops=0.3, at most 1 % lost"


@pytest.mark.parametrize(("given", "drop"), [("1%", 0.01), ("0.01", 0.01), ("any", None), (1, 1.0)])
def test_a_largest_drop(given: Any, drop: float | None) -> None:
    assert Wish.of("flops=0.3", given).max_drop == drop


def test_latency_goes_by_flops() -> None:
    assert [Wish(kind, 0.5).counted for kind in ("flops", "kv", "latency")] == ["flops", "kv", "flops"]


@pytest.mark.parametrize(
    ("budget", "drop", "message"),
    [
        ("flop=0.3", None, "budget: unknown kind 'flop', expected one of flops, kv, latency (did you mean 'flops'?)"),
        ("flops=30", None, "above 0 and below 1, got 30.0"),
        ("flops=0", None, "above 0 and below 1, got 0.0"),
        ({"kv": 1}, None, "bytes of keys and values, above 0 and below 1, got 1"),
        ({"kv": True}, None, "above 0 and below 1, got True (bool)"),
        ("flops=half", None, "got 'half' (str)"),
        ("0.3", None, "budget: expected one such as flops=0.3 or {'flops': 0.3}, got '0.3' (str)"),
        ({"kv": 0.1, "flops": 0.2}, None, "budget: expected one such as flops=0.3"),
        ("flops=0.3", 1.5, "max_drop: expected a drop of the mean score from 0 to 1 (0.01 is 1 %), got 1.5"),
        (
            "flops=0.3",
            "150%",
            "max_drop: expected a drop of the mean score from 0 to 1 (0.01 is 1 %), got '150%' (str)",
        ),
        ("flops=0.3", [0.1], "max_drop: expected a drop of the mean score from 0 to 1 (0.01 is 1 %), got [0.1] (list)"),
        ("flops=0.3", "few", "max_drop: expected a share such as 1% or 0.01, or any, got 'few'"),
    ],
)
def test_a_wish_that_is_none(budget: Any, drop: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        Wish.of(budget, drop)
    assert "\n" not in str(e.value)


def samples(*pictures: bytes) -> list[Sample]:
    return [Sample(i, "what", None, (picture,)) for i, picture in enumerate(pictures)]


def test_samples_about_one_picture_stay_together() -> None:
    given = samples(*(bytes([i // 3]) for i in range(60)))
    for seed in range(3):
        search, rest = split(given, 0.5, seed)
        assert sorted(s.id for s in [*search, *rest]) == list(range(60))
        assert not {s.images for s in search} & {s.images for s in rest}
        assert abs(len(search) - 30) <= 2
    assert split(given, 0.5, 0) == split(given, 0.5, 0) != split(given, 0.5, 1)
    assert [len(side) for side in split(samples(b"a", b"b"), 0.01, 0)] == [1, 1]


def test_no_picture_is_on_both_sides(tmp_path: Path) -> None:
    for name in ("one", "copy"):
        (tmp_path / name).write_bytes(b"the same")
    gray, black = Image.new("L", (2, 2)), Image.new("RGB", (2, 2))
    pictures = [
        (b"a",),
        (b"x", b"a"),
        (b"x",),
        (tmp_path / "one",),
        (tmp_path / "copy", gray),
        (gray.copy(),),
        (black,),
    ]
    given = [Sample(i, "what", None, images) for i, images in enumerate(pictures)]
    seen = set[tuple[int | str, ...]]()
    for seed in range(8):
        for side in split(given, 0.5, seed):
            seen.add(tuple(sorted(s.id for s in side)))  # type: ignore[type-var]
    assert seen <= {(0, 1, 2), (3, 4, 5), (6,), (0, 1, 2, 6), (3, 4, 5, 6), (0, 1, 2, 3, 4, 5)}
    assert len(seen) > 2


@pytest.mark.parametrize("held_out", [0.0, 1.0])
def test_no_share_to_hold_out(held_out: float) -> None:
    with pytest.raises(ValueError, match=f"above 0 and below 1, got {held_out}"):
        split(samples(b"a", b"b"), held_out, 0)


def test_one_picture_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="at least two different pictures, .* got 3 about 1"):
        split(samples(b"a", b"a", b"a"), 0.5, 0)


def test_rungs() -> None:
    assert rungs([8] * 30) == [6, 18, 30]
    assert rungs([16] * 9) == [3, 9]
    assert rungs([8] * 6) == [6]
    assert rungs([64, 64]) == [1, 2]
    assert rungs([4]) == [1]


def test_amounts_rise_in_turn() -> None:
    drawn = {"start": 0.0, "later": 0.5, "layers": 0.4}
    assert spread(1 / 6, drawn) == pytest.approx({"start": 0.5, "later": 0.25, "layers": 0.4})
    assert spread(1 / 3, drawn) == pytest.approx({"start": 1, "later": 0.5, "layers": 0.4})
    assert spread(1 / 2, drawn) == pytest.approx({"start": 1, "later": 0.75, "layers": 0.4})
    assert spread(5 / 6, drawn) == pytest.approx({"start": 1, "later": 1, "layers": 0.7})
    assert spread(1, drawn) == pytest.approx(dict.fromkeys(drawn, 1))
    assert spread(0.3, {"layers": 0.0}) == {"layers": 0.3}


class Costs:
    """Prompts whose costs are what the passes say; all batches cost more than the first ones by some."""

    def __init__(self, by: float = 0.002) -> None:
        self.by = by

    def effective(self, passes: Any) -> Any:
        return passes

    def shares(self, passes: Any, all_of_them: bool) -> dict[str, float] | None:
        [x] = passes
        return None if x is None else {"flops": x + self.by * all_of_them, "kv": x}


def test_the_dearest_within_a_budget() -> None:
    found = solve(Shape(lambda x: (x,)), Costs(), "flops", 0.5)
    assert found is not None
    assert found.passes == (pytest.approx(0.498),)  # all batches together cost more than those that are looked at
    assert solve(Shape(lambda x: (x + 0.6,)), Costs(), "flops", 0.5) is None
    assert solve(Shape(lambda _: (None,)), Costs(), "flops", 0.5) is None
    dearer = solve(Shape(lambda x: (x / 2,)), Costs(by=-0.1), "flops", 0.3)
    assert dearer is not None
    assert dearer.passes == (pytest.approx(0.4, abs=1e-3),)  # far from what the first batches say
    far = solve(Shape(lambda x: (x,)), Costs(by=0.3), "flops", 0.5)
    assert far is not None
    assert far.passes == (pytest.approx(0.2, abs=1e-3),)
    cheap = solve(Shape(lambda x: (x / 4,)), Costs(), "kv", 0.5)
    assert cheap is not None
    assert cheap.passes == (0.25,)


def row(name: str, accuracy: float, kl: float, flops: float = 0.5, n: int = 4) -> Row:
    known: dict[str, Any] = dict.fromkeys(Row.__dataclass_fields__)
    known |= {"recipe": name, "n": n, "accuracy": accuracy, "interval": (0.0, 1.0), "flops": flops, "kinds": {}}
    known |= {"difference": accuracy - 1, "difference_interval": (accuracy - 1.2, accuracy - 0.8)}
    return Row(**known | {"agreement": {"kl": kl}, "refused": ()})


def evaluation(**told: tuple[list[float], float]) -> Evaluation:
    rows = tuple(row(name, sum(x) / len(x), kl, n=len(x)) for name, (x, kl) in told.items())
    lines = [{"recipe": name, "id": i, "score": s} for name, (x, _) in told.items() for i, s in enumerate(x)]
    return Evaluation(rows, tuple(lines), (), {"metric": "exact"}, ())


def test_kl_breaks_what_are_ties() -> None:
    a, b = [1.0] * 19 + [0.0], [1.0] * 17 + [0.0, 0.0, 1.0]
    done = evaluation(a=(a, 0.5), b=(b, 0.1), c=([1.0] * 10 + [0.0] * 10, 0.01))
    assert best(done, ["a", "b", "c"]) == "b"
    assert best(done, ["a", "c"]) == "a"


def test_a_control_wins_ties() -> None:
    done = evaluation(mine=([1.0, 1.0, 1.0, 0.0], 0.1), even=([1.0, 1.0, 0.0, 1.0], 0.2), few=([0.0] * 4, 0.3))
    assert preferred(done, "mine", ["even", "few"])[0] == "even"
    assert "a control is as good: mine is +0.0 % to the control even" in preferred(done, "mine", ["even", "few"])[1][0]
    name, [said] = preferred(done, "mine", ["few"])
    assert name == "mine"
    assert "a control may be as good: mine is +75.0 %" in said
    sure = evaluation(mine=([1.0] * 40, 0.1), few=([0.0] * 40, 0.3))
    assert preferred(sure, "mine", ["few"])[1][0].startswith("mine is +100.0 % to the control few")
    assert preferred(done, "mine", []) == ("mine", [])


def costing(done: Evaluation, **costs: dict[str, float]) -> Evaluation:
    return replace(done, rows=tuple(replace(r, **costs.get(r.recipe, {})) for r in done.rows))


def test_a_control_that_costs_too_much_takes_no_place() -> None:
    done = evaluation(mine=([1.0, 1.0, 1.0, 0.0], 0.1), even=([1.0] * 4, 0.2), few=([0.0] * 4, 0.3))
    slow = costing(done, mine={"prefill": 3.0}, even={"prefill": 1.5}, few={"prefill": 4.0})
    wish, controls = Wish("latency", 0.4, 0.25), ["even", "few"]
    assert taken(slow, "mine", controls, wish)[0] == "mine"
    assert taken(slow, "mine", controls, replace(wish, share=0.7))[0] == "even"
    assert taken(slow, "mine", controls, replace(wish, max_drop=0.0))[0] == "mine"  # of those quick enough
    assert taken(slow, "mine", controls, replace(wish, share=0.2))[0] == "even"  # none is
    name, [said] = taken(slow, "mine", controls, Wish("latency", 0.3))
    assert name == "few"
    assert said.startswith("mine costs 0.33333 of the seconds of the prefill on held-out samples")
    dear = costing(done, mine={"flops": 0.29}, even={"flops": 0.31}, few={"flops": 0.29})
    assert taken(dear, "mine", controls, Wish("flops", 0.3, 0.25))[0] == "mine"
    assert taken(dear, "mine", controls, Wish("flops", 0.2, 0.25))[0] == "even"


def point(name: str, accuracy: float, flops: float, latency: float | None = None) -> Point:
    recipe = SimpleNamespace(name=name)
    return Point(recipe, {"flops": flops, "kv": 1.0, "latency": latency}, row(name, accuracy, 0.1))  # type: ignore[arg-type]


def test_the_front() -> None:
    points = with_front([point("c", 0.8, 0.5), point("a", 0.7, 0.1), point("b", 0.6, 0.2)], "flops")
    assert [(p.recipe.name, p.on_front) for p in points] == [("a", True), ("b", False), ("c", True)]


def test_the_plot_is_against_what_the_budget_is_of() -> None:
    rows = [replace(row("quick", 0.9, 0.1), prefill=4.0), replace(row("slow", 0.8, 0.1), prefill=2.0)]
    plot = pareto([*rows, row("unmeasured", 1.0, 0.1)], "latency")
    assert "quick: 90.0 % at 0.250 of the seconds of the prefill" in plot
    assert ">seconds of the prefill, share<" in plot
    assert (plot.count('class="best"'), plot.count('class="other"')) == (1, 1)


def test_verdicts() -> None:
    wish, points = (
        Wish("flops", 0.3, 0.01),
        [point("dear", 1.0, 0.9), point("less", 0.995, 0.7), point("bad", 0.5, 0.1)],
    )
    met, said = verdict(wish, row("r", 0.99, 0.1), 0.3, points)
    assert met
    assert said.startswith("flops=0.3, at most 1 % lost: met. r costs 0.300 of the FLOPs")
    met, said = verdict(wish, row("r", 0.9, 0.1), 0.3, points)
    assert not met
    assert "nothing meets it. Nearest: r costs 0.300" in said
    assert said.endswith("the cheapest that loses so little on the searched samples: less, at 0.700")
    assert not verdict(replace(wish, share=0.2), row("r", 1.0, 0.1), 0.3, points)[0]
    assert verdict(Wish("flops", 0.3), row("r", 0.1, 0.1), 0.3, points)[0]
    assert verdict(Wish("flops", 0.3), row("r", 1.0, 0.1), 0.4, points)[1].endswith("searched samples: bad, at 0.100")
    met, said = verdict(wish, row("r", 0.99, 0.1), 0.3033, points, 0.2999)
    assert not met
    assert "; within the budget on the searched samples (0.29990), above it on these (0.30330)" in said
    slow = verdict(Wish("latency", 0.3, 0.01), row("r", 1.0, 0.1), None, points)
    assert slow[0] is False
    assert slow[1].endswith("none of the recipes that were tried loses so little at any budget")


def test_a_recipe_that_sets_no_processor() -> None:
    thing = object()
    assert Recipe(name="x", passes=(Stride(0.5),)).processor(thing) is thing
