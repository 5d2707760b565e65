"""Potentials of greedy search by their definition: of a few tokens, each going on from where it was known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

SIDE = 144
"""Rows whose products are computed at a time."""

BLOCK = 2**17
"""Numbers in a block of differences, or of a row's products with others: what stays in a processor's cache while it is
added up."""

Array = npt.NDArray[np.floating]
"""Bounds are on the host: NumPy's functions of some hundred numbers take less time than PyTorch's."""

Places = npt.NDArray[np.intp]


class Renewals:
    """Potentials by a definition that adds one pick after the other: those of a token go on from where they were.

    Args:
        x: features, fp32 [I, m, C].
        k: how many are picked of each image.
        after: potentials of some tokens [r, C], None before the first pick, after more picks, [p, C]. Before and after,
            fp64 [r], on the CPU.
    """

    def __init__(self, x: Tensor, k: int, after: Callable[[Tensor | None, Tensor, Tensor], Tensor]) -> None:
        self._x, self._after = x, after
        self._past = x.new_empty(len(x), k - 1, x.shape[2])  # the picks' features, so that none is gathered again
        self._known = torch.zeros(x.shape[:2], dtype=torch.float64, device="cpu")
        self._seen, self._there = torch.zeros_like(self._known, dtype=torch.int64), [0] * len(x)

    def of(self, image: int, rows: Places, picks: Places) -> Array:
        """Potentials of some tokens of an image, [r], after its picks, [p]: fp64 [r]."""
        x, past, known, seen = self._x[image], self._past[image], self._known[image], self._seen[image]
        past[self._there[image] : len(picks)] = x[torch.from_numpy(picks[self._there[image] :])]
        self._there[image] = len(picks)
        these = torch.from_numpy(rows)
        before = seen[these]
        for n in set(before.tolist()):
            some = these[before == n]
            known[some] = self._after(known[some] if n else None, x[some], past[n : len(picks)])
        seen[these] = len(picks)
        found: Array = known[these].numpy()
        return found


def added_in_order(total: Tensor | None, terms: Tensor) -> Tensor:
    """``total``, fp64 [r] on the CPU, and each row of ``terms`` [p, r], one after the other, each sum rounded."""
    terms = terms.cpu().double()
    total = terms.new_zeros(terms.shape[1]) if total is None else total
    return total[None].index_add(0, torch.zeros(len(terms), dtype=torch.int64, device="cpu"), terms)[0]


def pairwise(f: Callable[[Tensor, Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """``f(x, y, room)``, the same whichever is which, of each row x of a [n, C] and y of b [r, C]: [n, r].

    ``room`` is as large as x, for what is computed on the way: with the same memory each time it stays in the
    processor's cache.
    """
    side = min(max(len(a), len(b)), max(16, BLOCK // a.shape[1]))
    room = a.new_empty(side, a.shape[1])
    if len(a) < len(b):
        return torch.stack([torch.cat([f(some, x, room[: len(some)]) for some in b.split(side)]) for x in a])
    return torch.cat([torch.stack([f(some, y, room[: len(some)]) for y in b], 1) for some in a.split(side)])
