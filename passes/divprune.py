"""DivPrune, diversity-based visual token pruning (arXiv 2503.02175), training-free.

Before the decoder, those tokens of each image are kept whose closest pair is as far apart as a greedy search finds.

    layers 0-31    run_on All  ->  layers 0-31    run_on Text | divprune

Refused where no vision tokens are left. Distance and search are the paper's: cosine, the first token is the one whose
nearest other token is farthest. Ours: ties go to the first token, a chosen token is never chosen again, and of large
images the matrix of all distances is not kept (only its rows' extremes, block by block, for the first token).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmrewrite.draw import Draw
from vlmrewrite.ops import (
    SIDE,
    Array,
    Places,
    Products,
    Renewals,
    channel_order,
    define,
    greedy_choice,
    greedy_flops,
    greedy_scratch,
    least_of,
    like_member,
    pairwise,
    product_rounding,
    small_first,
    upper_products,
)
from vlmrewrite.plan import Budget, Per, Plan, Policy, frozen_pass


def divprune_sample(features: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """Greedy max-min diversity by cosine distance (arXiv 2503.02175), each image for itself.

    The first token is the one whose smallest distance to another token is largest; then always the one is added whose
    smallest distance to the chosen ones is largest. fp32; ties go to the first token, and a zero feature is at
    distance 1 from all. O(m^2 C) for m tokens; if m > 4096, O(m C) more a step, at most 144 x m distances at a time.

    Args:
        features: [F, C], any float dtype.
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each image, int64 [I], sum F, on the CPU.
        keep: how many to choose of each image, int64 [I], on the CPU.

    Returns:
        the chosen tokens, bool [F].
    """
    return greedy_choice(features, member, lengths, keep, _Cosine, spread)


def spread(x: Tensor, k: int) -> Tensor:
    """The definition: the first ``k`` picks of one image, x fp32 [m, C], k < m; what is not a number is picked last."""
    x = F.normalize(x, dim=1)
    pick = _closest_other(x.index_select(1, channel_order(x))).argmin()
    picks = [pick]
    similarity = torch.full((len(x),), -torch.inf, device=x.device)  # to the most similar chosen token
    left = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(k - 1):
        similarity = similarity.maximum(_cosines(x, x.index_select(0, pick[None])))
        left = left.index_fill(0, pick[None], False)
        pick = least_of(similarity, left)
        picks.append(pick)
    return torch.stack(picks)


def _cosines(x: Tensor, y: Tensor, room: Tensor | None = None) -> Tensor:
    return torch.mul(x, y, out=room).sum(1)


def _closest_other(x: Tensor) -> Tensor:
    """Cosine of each row of x [m, C] to its most similar other row; each pair is computed once, so ties stay ties."""
    best = torch.full((len(x),), -torch.inf, device=x.device)
    for start, pairs in upper_products(x, SIDE):
        pairs.masked_fill_(torch.ones_like(pairs, dtype=torch.bool).tril(), -torch.inf)
        rows = best[start : start + len(pairs)]
        rows.copy_(rows.maximum(pairs.amax(1)))
        best[start:] = best[start:].maximum(pairs.amax(0))
    return best


def _then(_: int, potential: Array, rows: Places, pick: int, products: Array) -> Array:
    return np.maximum(potential, products)


def _after(potential: Tensor | None, rows: Tensor, picks: Tensor) -> Tensor:
    more = pairwise(_cosines, picks, rows).amax(0).cpu().double()
    return more if potential is None else potential.maximum(more)


class _Cosine:
    """Bounds of the similarities, products of rows of norm 1: off by at most what ``product_rounding(C)`` says."""

    def __init__(self, x: Tensor, k: int) -> None:
        self.x = F.normalize(x, dim=2)
        self.products = Products(small_first(self.x), x.shape[1], SIDE)  # the first pick is of all of the matrix
        self.renewals = Renewals(self.x, k, _after)
        off = sum(product_rounding(x.shape[2], x.device))
        self.off = np.array([-off, off], np.float32)[:, None, None]
        self.bounds: Array | None = None

    def first(self) -> Tensor:
        if self.products.gram is None:
            return torch.stack([_closest_other(x) for x in self.products.x])
        self.products.gram.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        return self.products.gram.amax(2)

    def next(self, picks: Places) -> tuple[Places, dict[int, Places]]:
        more = self.products.of(picks, None if self.bounds is None else self.bounds[0], _then) + self.off
        self.bounds = more if self.bounds is None else np.maximum(self.bounds, more, out=self.bounds)
        images = np.arange(len(picks))
        self.bounds[:, images, picks] = np.inf
        lower, upper = self.bounds
        last = lower.argmin(1)
        near = lower <= upper[images, last][:, None]
        several = (np.count_nonzero(near, 1) > 1).nonzero()[0] if np.count_nonzero(near) > len(last) else ()
        return last, {int(image): near[image].nonzero()[0] for image in several}

    def exactly(self, image: int, rows: Places, picks: Places) -> Array:
        assert self.bounds is not None
        if self.products.rows is None:
            potential = self.renewals.of(image, rows, picks)
        else:
            potential = self._by_closest(self.products.rows[image][np.ix_(rows, picks)], image, rows, picks)
        self.bounds[:, image, rows] = potential
        return potential

    def _by_closest(self, products: Array, image: int, rows: Places, picks: Places) -> Array:
        """As :meth:`exactly`, by the picks that may be most similar to a row, by their products [r, p]."""
        row, pick = (products >= products.max(1, keepdims=True) - 2 * self.off[1, 0, 0]).nonzero()
        x = self.x[image]
        cosines = _cosines(x[torch.from_numpy(rows[row])], x[torch.from_numpy(picks[pick])]).cpu().numpy()
        found = np.full(len(rows), -np.inf)
        np.maximum.at(found, row, cosines)
        return found


define(
    "divprune_sample(Tensor features, Tensor member, Tensor lengths, Tensor keep) -> Tensor",
    divprune_sample,
    like_member,
    kernel="vlmrewrite.kernels.greedy.sample:cosine",
    flops=greedy_flops,
    flops_by_value=True,
    scratch=greedy_scratch,
)


@frozen_pass
class DivPrune:
    """Keep the vision tokens that are farthest apart, before the decoder.

    Args:
        keep: int tokens per image, or float fraction of each image's tokens.
        per: what the budget is of: each ``"frame"`` (an image is one), each ``"image"`` or whole video, or all of a
            ``"row"`` together.
    """

    name: ClassVar[str] = "divprune"
    tunes: ClassVar[tuple[str, ...]] = ("start",)

    keep: Budget = 0.1
    per: Per = "image"

    @classmethod
    def tuned(cls, amount: float, draw: Draw) -> DivPrune:
        """Nothing is drawn."""
        return cls(keep=amount)

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left."""
        return plan.exhausted()

    def change(self, plan: Plan) -> None:
        """One selection on the projected features."""
        plan.narrow(Policy("divprune", torch.ops.vlm.divprune_sample.default, ("features",)), self.keep, per=self.per)
