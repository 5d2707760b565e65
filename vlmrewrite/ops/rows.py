"""Some rows of a batch by themselves: cut out of what a graph is given, and joined of what came of several cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROWS, TOKENS = "rows", "tokens"

Along = int | str | None
"""The axis that holds rows; or ROWS for their number, TOKENS for an entry for each vision token; None: no rows."""


class Run(NamedTuple):
    """A plan of a dispatch that ran: its number, the rows that it ran for, and those of them that keep its result."""

    variant: int
    rows: list[int]
    kept: list[int]


def cut(x: Any, along: Along, rows: Tensor, tokens: Tensor) -> Any:
    """What a graph is given for some rows.

    Args:
        x: what it is given for all.
        along: where that holds rows.
        rows: int64 [b].
        tokens: numbers of the vision tokens of these rows, int64 [f].
    """
    if along is None:
        return x
    if along == ROWS:
        return len(rows)
    if along == TOKENS:  # several of an image may stand behind one another
        return x.flatten(0, max(0, x.dim() - 2)).index_select(0, tokens).unflatten(0, (-1, *x.shape[1:-1]))
    return x.index_select(along, rows)


class Join(NamedTuple):
    """How an output is put together again: the axis of its rows, and what fills up those that are shorter, or None."""

    axis: int
    fill: int | None


def joined(outs: Sequence[Sequence[Any]], joins: Sequence[Join | None], runs: Sequence[Run]) -> list[Any]:
    """What a graph returned for some rows at a time, as if for all at once, each row's from the run that it kept.

    Args:
        outs: of each run that rows kept, what it returned.
        joins: for each output; None where every run returned the same.
        runs: those runs.
    """
    if len(outs) == 1:
        return list(outs[0])
    made, found = dict[tuple[int, ...], Any](), []
    for join, *each in zip(joins, *outs, strict=True):
        key = tuple(map(id, each))  # layers that hold the same tokens share their positions, and go on to
        if key not in made:
            made[key] = each[0] if join is None else _joined(each, join, runs)
        found.append(made[key])
    return found


def _joined(each: list[Tensor], join: Join, runs: Sequence[Run]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(x.shape for x in each), strict=True)]
    shape[join.axis] = sum(len(run.kept) for run in runs)
    out = each[0].new_empty(shape) if join.fill is None else each[0].new_full(shape, join.fill)
    for x, run in zip(each, runs, strict=True):
        part, rows = out, torch.tensor(run.kept, device=x.device)
        for d in range(x.dim()) if join.fill is not None else ():
            part = part if d == join.axis else part.narrow(d, 0, x.shape[d])
        if run.kept != run.rows:
            which = torch.tensor([run.rows.index(row) for row in run.kept], device=x.device)
            x = x.index_select(join.axis, which)
        part.index_copy_(join.axis, rows, x)
    return out
