"""Which candidate is best, and whether it is what was wished for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import sqrt

from vlmrewrite.evaluate import Evaluation, Row, paired
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


def latency(row: Row) -> float | None:
    """Seconds of a prefill as a share of the unmodified model's, as measured."""
    return None if row.prefill is None else 1 / row.prefill


def with_front(points: Sequence[Point], kind: str) -> tuple[Point, ...]:
    """The points by cost, those of the front marked."""
    found, highest = list[Point](), -1.0
    for point in sorted(points, key=lambda p: (_cost(p, kind), -p.row.accuracy)):
        found.append(replace(point, on_front=point.row.accuracy > highest))
        highest = max(highest, point.row.accuracy)
    return tuple(found)


def _cost(point: Point, kind: str) -> float:
    cost = point.cost[kind]
    return float("inf") if cost is None else cost


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


def verdict(wish: Wish, row: Row, cost: float | None, points: Sequence[Point]) -> tuple[bool, str]:
    """Whether a held-out row is what was wished for, and a sentence about it with what comes nearest if not.

    Args:
        wish: it.
        row: of the recipe.
        cost: of the recipe, by what the budget is of.
        points: what else there is.
    """
    what, lost = KINDS[wish.kind], -row.difference
    told = f"{row.recipe} costs {_share(cost)} of the {what} and scores {100 * row.difference:+.1f} % to the unmodified"
    bounds = " to ".join(f"{100 * x:+.1f}" for x in row.difference_interval)
    told += f" model on {row.n} held-out samples (95 %: {bounds})"
    cheap = cost is not None and cost <= wish.share + 1e-9
    good = wish.max_drop is None or lost <= wish.max_drop + 1e-9
    if cheap and good:
        return True, f"{wish}: met. {told}"
    found = [p for p in points if -p.row.difference <= (wish.max_drop or 0) + 1e-9 and p.cost[wish.kind] is not None]
    nearest = min(found, key=lambda p: _cost(p, wish.kind), default=None)
    rest = "none of the recipes that were tried loses so little at any budget"
    if nearest is not None:
        rest = (
            f"the cheapest that loses so little on the searched samples: {nearest.row.recipe}, at"
            f" {_share(nearest.cost[wish.kind])}"
        )
    return False, f"{wish}: nothing meets it. Nearest: {told}; {rest}"


def _share(cost: float | None) -> str:
    return "an unknown share" if cost is None else f"{cost:.3f}"
