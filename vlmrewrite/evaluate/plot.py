"""Accuracy against FLOPs as SVG: each recipe with its interval, and the line of those that none beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor

from vlmrewrite.evaluate.results import Row
from vlmrewrite.markup import escape

_WIDTH, _HEIGHT = 760, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 150, 16, 48


_COSTS = {"flops": "FLOPs of the prefill", "kv": "K/V bytes of the prefill", "latency": "seconds of the prefill"}


def cost_of(row: Row, by: str) -> float | None:
    """What a row costs, as a share of the unmodified model's: ``"flops"``, ``"kv"``, or ``"latency"`` of a prefill."""
    if by == "latency":
        return None if row.prefill is None else 1 / row.prefill
    found: float | None = getattr(row, by)
    return found


def front(costs: Sequence[float | None], scores: Sequence[float]) -> list[int]:
    """Which places, the cheapest first, no other is as cheap and better than, or as good and cheaper.

    What has no cost is at none of them.
    """
    known = [(cost, -score, i) for i, (cost, score) in enumerate(zip(costs, scores, strict=True)) if cost is not None]
    best, found = -1.0, []
    for _, score, i in sorted(known):
        if -score > best:
            best = -score
            found.append(i)
    return found


def pareto(rows: Sequence[Row], by: str = "flops") -> str:
    """The plot, against ``"flops"``, ``"kv"`` or ``"latency"``; in colours of the page it stands in."""
    shown = [row for row in rows if cost_of(row, by) is not None]
    if not shown:
        return ""
    low = floor(10 * min(row.interval[0] for row in shown)) / 10
    high = ceil(10 * max(row.interval[1] for row in shown)) / 10
    most = ceil(10 * max(cost_of(row, by) or 0.0 for row in shown)) / 10
    low, high = (low, high) if high > low else (low - 0.1, high)

    def x(flops: float) -> float:
        return _LEFT + flops / most * (_WIDTH - _LEFT - _RIGHT)

    def y(accuracy: float) -> float:
        return _HEIGHT - _BOTTOM - (accuracy - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for i in range(6):
        a, f = low + (high - low) * i / 5, most * i / 5
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y(a):.1f}H{_WIDTH - _RIGHT}M{x(f):.1f} {_TOP}V{_HEIGHT - _BOTTOM}"/>'
        )
        parts.append(f'<text x="{_LEFT - 8}" y="{y(a) + 4:.1f}" text-anchor="end">{100 * a:.0f}</text>')
        parts.append(f'<text x="{x(f):.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{f:.2f}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{_COSTS[by]}, share</text>')
    parts.append(f'<text transform="translate(16 {_HEIGHT / 2}) rotate(-90)" text-anchor="middle">score, %</text>')
    best = [shown[i] for i in front([cost_of(row, by) for row in shown], [row.accuracy for row in shown])]
    steps = [f"M{x(cost_of(best[0], by) or 0):.1f} {y(best[0].accuracy):.1f}"]
    steps += [f"H{x(cost_of(row, by) or 0):.1f}V{y(row.accuracy):.1f}" for row in best[1:]]
    parts.append(f'<path class="front" d="{"".join(steps)}"/>')
    lines = _apart([y(row.accuracy) for row in shown])
    for row, line in zip(shown, lines, strict=True):
        at, (bottom, top) = x(cost_of(row, by) or 0), (y(v) for v in row.interval)
        told = f"{row.recipe}: {100 * row.accuracy:.1f} % at {cost_of(row, by):.3f} of the {_COSTS[by]}"
        parts.append(
            f'<g class="{"best" if row in best else "other"}"><title>{escape(told)}</title>'
            f'<path class="bar" d="M{at:.1f} {bottom:.1f}V{top:.1f}m-4 0h8M{at - 4:.1f} {bottom:.1f}h8"/>'
            f'<circle cx="{at:.1f}" cy="{y(row.accuracy):.1f}" r="5"/>'
            f'<path class="lead" d="M{at + 6:.1f} {y(row.accuracy):.1f}L{at + 16:.1f} {line:.1f}"/>'
            f'<text x="{at + 18:.1f}" y="{line + 4:.1f}">{escape(row.recipe)}</text></g>'
        )
    return (
        f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>score against {_COSTS[by]}</title>'
        f"{''.join(parts)}</svg>"
    )


def _apart(places: Sequence[float], gap: float = 15) -> list[float]:
    """Heights of labels near those of their points, none on another."""
    out, below = dict[int, float](), 0.0
    for i in sorted(range(len(places)), key=places.__getitem__):
        out[i] = below = max(places[i], below + gap)
    over = max(0.0, below - (_HEIGHT - _BOTTOM))
    return [out[i] - over for i in range(len(places))]
