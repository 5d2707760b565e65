"""What can be said of a search before there is a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from vlmrewrite.errors import one_of, shown
from vlmrewrite.evaluate import METRICS, Metric
from vlmrewrite.tune.files import check_output
from vlmrewrite.tune.search import optuna
from vlmrewrite.tune.wish import Wish, is_a


def check_wish(
    budget: str | Mapping[str, float],
    max_drop: float | str | None,
    output: str | os.PathLike[str] | None,
    *,
    metric: str | Metric = "auto",
    held_out: float = 0.5,
    seed: int = 0,
    **counts: int,
) -> tuple[Wish, Path | None]:
    """What can be said before a model is there: the wish, and the path of the recipe.

    Args:
        budget, max_drop, output, metric, held_out, seed: as for :func:`vlmrewrite.tune`.
        counts: what must be 1 at least, by name.

    Raises:
        ValueError: one cannot be used.
        ImportError: Optuna is not installed.
    """
    optuna()
    wish = Wish.of(budget, max_drop)
    for name, value in counts.items():
        _check_integer(name, value, 1)
    _check_integer("seed", seed, 0, 2**32 - 1)
    check_share(held_out)
    if not callable(metric) and metric not in ("auto", *METRICS):
        raise ValueError(f"metric: {one_of(str(metric), ['auto', *METRICS])}, or a function, got {shown(metric)}")
    return wish, check_output(output)


def check_share(held_out: Any) -> None:
    """Raise ValueError unless it is a share of samples that leaves some on both sides."""
    if not is_a(Real, held_out) or not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share of the samples, above 0 and below 1, got {shown(held_out)}")


def _check_integer(name: str, value: Any, low: int, high: int | None = None) -> None:
    if not is_a(Integral, value) or not low <= value <= (value if high is None else high):
        most = "" if high is None else f" and <= {high}"
        raise ValueError(f"{name}: expected an integer >= {low}{most}, got {shown(value)}")
