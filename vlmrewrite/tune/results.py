"""What a search found: the recipe, how it and the controls did on held-out samples, and what else there is to buy."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from vlmrewrite.evaluate import Evaluation, Row
from vlmrewrite.markup import Shown
from vlmrewrite.recipe import Recipe
from vlmrewrite.report import LayerProfile
from vlmrewrite.text import table


@dataclass(frozen=True)
class Point:
    """A recipe that answered the samples that were searched on.

    Attributes:
        recipe: it.
        cost: shares of the unmodified model's: ``flops`` and ``kv`` from the plan, ``latency`` of the prefill as it was
            measured, None where it was not.
        row: how it did.
        on_front: whether none of the others is as cheap and better, or as good and cheaper, by what the budget is of.
    """

    recipe: Recipe
    cost: dict[str, float | None]
    row: Row
    on_front: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        told = {
            key: getattr(self.row, key) for key in ("n", "accuracy", "interval", "difference", "difference_interval")
        }
        kl = self.row.agreement["kl"]
        return {"recipe": self.recipe.to_data(), "cost": self.cost, **told, "kl": kl, "on_front": self.on_front}


@dataclass(frozen=True)
class Tuned(Shown):
    """What :func:`vlmrewrite.tune` found. ``str`` is a table, ``to_dict`` for JSON.

    Attributes:
        recipe: what to apply; None if nothing meets the wish.
        best: what did best within the budget, whether it meets the wish or not.
        verdict: in a sentence, whether the wish is met, and by what.
        notes: what is to be kept in mind.
        held_out: the unmodified model, ``best`` and the controls on the samples that the search did not see.
        points: what answered the searched samples, the cheapest first: the best of the search, and the same kinds of
            recipes for other budgets.
        profile: of the layers.
        tried: the recipes that were run, the best first: ``passes``, ``flops``, ``kv``, ``kl`` (mean, nats) and ``n``,
            the prompts it is of.
        provenance: of what the recipe is: model, data, seed, versions, numbers of samples.
    """

    recipe: Recipe | None
    best: Recipe
    verdict: str
    notes: tuple[str, ...]
    held_out: Evaluation
    points: tuple[Point, ...]
    profile: LayerProfile = field(repr=False)
    tried: tuple[dict[str, Any], ...] = field(repr=False)
    provenance: dict[str, Any]

    @property
    def met(self) -> bool:
        """Whether a recipe meets the wish."""
        return self.recipe is not None

    @property
    def front(self) -> tuple[Point, ...]:
        """The points of which no other is as cheap and better, or as good and cheaper."""
        return tuple(point for point in self.points if point.on_front)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings; None for a KL that is not finite."""
        found = {
            "met": self.met,
            "verdict": self.verdict,
            "notes": self.notes,
            "recipe": None if self.recipe is None else self.recipe.to_data(),
            "best": self.best.to_data(),
            "held_out": self.held_out.to_dict()["rows"],
            "front": [point.to_dict() for point in self.front],
            "points": [point.to_dict() for point in self.points],
            "profile": asdict(self.profile),
            "tried": self.tried,
            "provenance": self.provenance,
        }
        plain: dict[str, Any] = json.loads(json.dumps(_finite(found), allow_nan=False))
        return plain

    def cells(self) -> list[list[str]]:
        """The points as text, headings first."""
        rows = [["recipe", "score", "difference", "FLOPs", "K/V", "latency", ""]]
        for point in self.points:
            row, cost = point.row, [point.cost[kind] for kind in ("flops", "kv", "latency")]
            shares = ["" if x is None else f"{x:.3f}" for x in cost]
            score = f"{100 * row.accuracy:.1f}", f"{100 * row.difference:+.1f}"
            rows.append([row.recipe, *score, *shares, "front" if point.on_front else ""])
        return rows

    def __str__(self) -> str:
        head = self.held_out.cells()
        lines = [f"held out: {self.held_out.rows[0].n} samples, {self.held_out.about['metric']}", *table(head), ""]
        lines += [f"searched: {self.points[0].row.n} samples", *table(self.cells()), ""]
        lines += [f"note: {note}" for note in self.notes]
        passes = ", ".join(map(repr, self.best.passes))
        return "\n".join([*lines, f"{self.best.name}: {passes}", self.verdict])


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not isfinite(value) else value
