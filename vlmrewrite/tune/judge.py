"""Which candidate is best, and whether it is what was wished for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf, sqrt

from vlmrewrite.evaluate import Evaluation, Row, cost_of, front, paired
from vlmrewrite.tune.results import Point
from vlmrewrite.tune.wish import KINDS, Wish


def scores(done: Evaluation, recipe: str) -> list[float]:
    """Of the samples that were answered under all recipes, in order."""
    failed = {failure["id"] for failure in done.failures}
    return [line["score"] for line in done.samples if line["recipe"] == recipe and line["id"] not in failed]


def best(done: Evaluation, names: Sequence[str]) -> str:
    """Of the recipes whose score is within a standard error of the highest, the one with the lowest KL.

    KL is the less noisy of the two, so that it breaks what are ties of the score (the rule of one standard error:
    Breiman et al., Classification and Regression Trees, 1984, section 3.4.3).
    """
    rows = {row.recipe: row for row in done.rows if row.recipe in names}
    top = max(rows.values(), key=lambda row: (row.accuracy, -row.agreement["kl"]))
    first = scores(done, top.recipe)

    def tied(row: Row) -> bool:
        changes = [b - a for a, b in zip(first, scores(done, row.recipe), strict=True)]
        middle = sum(changes) / len(changes)
        error = sqrt(sum((x - middle) ** 2 for x in changes)) / len(changes)
        return -middle <= error

    return min(filter(tied, rows.values()), key=lambda row: (row.agreement["kl"], row.recipe)).recipe


def with_front(points: Sequence[Point], kind: str) -> tuple[Point, ...]:
    """The points by cost, those of the front marked."""
    found = sorted(points, key=lambda p: (_cost(p, kind), -p.row.accuracy))
    marked = front([p.cost[kind] for p in found], [p.row.accuracy for p in found])
    return tuple(replace(point, on_front=i in marked) for i, point in enumerate(found))


def _cost(point: Point, kind: str) -> float:
    cost = point.cost[kind]
    return inf if cost is None else cost


ABOVE = 1.01
"""Recipes are solved to lie just below a budget on the searched prompts; on others, they may cost this much of it."""


def cheap(wish: Wish, cost: float | None) -> bool:
    """Whether a cost is known and within the budget, or above it by what other prompts make of it."""
    return cost is not None and cost <= wish.share * ABOVE


def good(wish: Wish, row: Row) -> bool:
    """Whether no more is lost than may be."""
    return wish.max_drop is None or -row.difference <= wish.max_drop + 1e-9


def taken(done: Evaluation, mine: str, controls: Sequence[str], wish: Wish) -> tuple[str, list[str]]:
    """Which recipe to take of those that are what was wished for, and what there is to say about that.

    If none is, of those that keep a budget of latency; if none does, of all.

    Args:
        done: on the held-out samples.
        mine: what was searched.
        controls: that it is compared with.
        wish: budget and largest loss, by held-out costs and scores.
    """
    rows = [row for row in done.rows if row.recipe in (mine, *controls)]
    kept = [row for row in rows if cheap(wish, cost_of(row, wish.kind))]
    rivals = [row for row in kept if good(wish, row)] or (kept if wish.kind == "latency" else []) or rows
    names = [row.recipe for row in rivals]
    if mine in names:
        return preferred(done, mine, [name for name in names if name != mine])
    name, own = best(done, names), next(row for row in rows if row.recipe == mine)
    cost = cost_of(own, wish.kind)
    share = _share(cost) if cost is None else f"{cost:.5f}"  # it may be above the budget by little
    told = f"{mine} costs {share} of the {KINDS[wish.kind]} on held-out samples and scores"
    return name, [f"{told} {100 * own.difference:+.1f} %, which is not what was wished for; a control is taken: {name}"]


def preferred(done: Evaluation, mine: str, controls: Sequence[str]) -> tuple[str, list[str]]:
    """Which recipe to take: ``mine``, unless a control scores as much; and what there is to say about that."""
    rows = {row.recipe: row for row in done.rows}
    others = sorted((rows[name] for name in controls), key=lambda row: (-row.accuracy, row.agreement["kl"]))
    if not others:
        return mine, []
    control, own = others[0], rows[mine]
    ahead = paired(scores(done, control.recipe), scores(done, mine))
    said = f"{mine} is {100 * ahead.difference:+.1f} % to the control {control.recipe} on {own.n} held-out samples"
    within = " to ".join(f"{100 * x:+.1f}" for x in ahead.interval)
    if control.accuracy >= own.accuracy:
        return control.recipe, [f"a control is as good: {said} ({within}); the control is taken"]
    if ahead.interval[0] <= 0:
        return mine, [f"a control may be as good: {said} ({within}), which is not told from 0 by so few"]
    return mine, [f"{said} ({within})"]


def verdict(
    wish: Wish, row: Row, cost: float | None, points: Sequence[Point], searched: float | None = None
) -> tuple[bool, str]:
    """Whether a held-out row is what was wished for, and a sentence about it with what comes nearest if not.

    Args:
        wish: it.
        row: of the recipe.
        cost: of the recipe on the held-out samples, by what the budget is of.
        points: what else there is.
        searched: its cost on the searched samples.
    """
    what = KINDS[wish.kind]
    told = f"{row.recipe} costs {_share(cost)} of the {what} and scores {100 * row.difference:+.1f} % to the unmodified"
    bounds = " to ".join(f"{100 * x:+.1f}" for x in row.difference_interval)
    told += f" model on {row.n} held-out samples (95 %: {bounds})"
    if cheap(wish, cost) and good(wish, row):
        return True, f"{wish}: met. {told}"
    if cost is not None and not cheap(wish, cost) and cheap(wish, searched):
        told += f"; within the budget on the searched samples ({searched:.5f}), above it on these ({cost:.5f})"
    found = [p for p in points if good(wish, p.row) and p.cost[wish.kind] is not None]
    nearest = min(found, key=lambda p: _cost(p, wish.kind), default=None)
    rest = "none of the recipes that were tried loses so little at any budget"
    if nearest is not None:
        rest = (
            f"the cheapest that loses so little on the searched samples: {nearest.row.recipe}, at"
            f" {_share(nearest.cost[wish.kind])}"
        )
    return False, f"{wish}: nothing meets it. Nearest: {told}; {rest}"


def doubts(wish: Wish, row: Row, met: bool) -> list[str]:
    """What the held-out samples leave open."""
    if not met or wish.max_drop is None or -row.difference_interval[0] <= wish.max_drop:
        return []
    most = -100 * row.difference_interval[0]
    told = f"{row.n} held-out samples do not exclude a drop of up to {most:.1f} % (95 %)"
    return [f"{told}, more than the {100 * wish.max_drop:g} % that were allowed"]


def _share(cost: float | None) -> str:
    return "an unknown share" if cost is None else f"{cost:.3f}"
