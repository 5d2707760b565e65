"""STS, Structure-to-Semantics pruning (arXiv 2606.03569), training-free.

Before the decoder, vision tokens are chosen that repel one another most (structure, blind to the text); at one layer
inside it, of those the ones that the last prompt token attends to most (semantics).

    layers 0-15    run_on All              ->  layers 0-15    run_on Text | repulsion
    layers 16-31   run_on All                  layers 16-31   run_on Text | relevance

Refused where the requested features cannot be reached or no vision tokens are left; the second stage is left out where
an earlier pass leaves none at its layer. The paper leaves open the constant in the potential, the first token and which
features; here 1e-6, the token nearest to the mean feature, and the projected ones.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from vlmrewrite.draw import Draw
from vlmrewrite.ops import (
    SIDE,
    Array,
    Places,
    Products,
    Renewals,
    added_in_order,
    define,
    greedy_choice,
    greedy_flops,
    greedy_scratch,
    least_of,
    like_member,
    order_of,
    pairwise,
    product_rounding,
    reordered,
)
from vlmrewrite.plan import Budget, Depth, Per, Plan, Policy, frozen_pass

EPSILON = 1e-6

UNIT, STEPS = 2.0**-24, 8
"""What one step in fp32 rounds by; and how many such steps are not like random ones: all distances of a token may be
off by them in the same direction. Taking out the mean is at most 3 of them, norms are 2."""

OFTEN = 16
"""After how many picks the largest error is looked for; in between, the largest of each pick are added up."""

SUM = 2.0**-40
"""What sums of some thousand numbers in fp64 are off, in units of themselves."""

NEAR = 2.0**-5
"""Of a distance that is off by more than this part of itself, both ends are looked at."""


def sts_sample(features: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """Greedy repulsion sampling (arXiv 2606.03569, section 3, stage 1), each image for itself.

    The first token is the one nearest to the mean; then always the one with the smallest potential
    ``U(i) = sum over chosen j of 1 / (|v_i - v_j|^2 + 1e-6)`` is added. Each term is computed in fp32, and their sum in
    fp64; ties go to the first token.

    Args:
        features: [F, C], any float dtype.
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each image, int64 [I], sum F, on the CPU.
        keep: how many to choose of each image, int64 [I], on the CPU.

    Returns:
        the chosen tokens, bool [F].
    """
    return greedy_choice(features, member, lengths, keep, _Repulsion, repel)


def repel(x: Tensor, k: int) -> Tensor:
    """The definition: the first ``k`` picks of one image, x fp32 [m, C], k < m; what is not a number is picked last."""
    potential = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    left = torch.ones(len(x), dtype=torch.bool, device=x.device)
    pick = _squares(x, x.mean(0)).argmin()
    picks = [pick]
    for _ in range(k - 1):
        potential += 1 / (_squares(x, x.index_select(0, pick[None])) + EPSILON)
        left = left.index_fill(0, pick[None], False)
        pick = least_of(potential, left)
        picks.append(pick)
    return torch.stack(picks)


def _squares(x: Tensor, y: Tensor, room: Tensor | None = None) -> Tensor:
    return torch.sub(x, y, out=room).square_().sum(1)


def _after(potential: Tensor | None, rows: Tensor, picks: Tensor) -> Tensor:
    return added_in_order(potential, 1 / (pairwise(_squares, picks, rows) + EPSILON))


def _centred(x: Tensor) -> tuple[Tensor, Array, Tensor]:
    """What all features are read for, some rows at a time.

    Returns:
        features without their mean, their channels in the order of products, [I, m, C]; their squared norms, fp64
        [I, m]; these as :func:`_squares` has them, fp32 [I, m].
    """
    side, norms, first, orders = min(SIDE // 2, x.shape[1]), [], [], []
    centred, room = torch.empty_like(x), x.new_empty(side, x.shape[2])
    wide = torch.empty_like(room, dtype=torch.float64, device="cpu")
    for image, to in zip(x, centred, strict=True):
        mean, channels = image.mean(0), x.new_zeros(x.shape[2])
        for rows, out in zip(image.split(side), to.split(side), strict=True):
            squares = torch.mul(torch.sub(rows, mean, out=out), out, out=room[: len(out)])
            channels += squares.sum(0)
            first.append(squares.sum(1))
            norms.append(wide[: len(rows)].copy_(squares).sum(1))
        orders.append(order_of(channels))
    shape = x.shape[:2]
    return reordered(centred, orders), torch.cat(norms).view(shape).numpy(), torch.cat(first).view(shape)


class _Repulsion:
    """Bounds of the potentials by ``d / 2 = |x|^2 / 2 + |y|^2 / 2 - xy``, the mean taken out, so that less cancels.

    A distance is off by at most ``product_rounding(C) (|x|^2 + |y|^2)``, its definition's rounding included: each has
    its own share of the 12 deviations in there. What the products with one pick are off says nothing of those with
    another, so that the errors of a sum of ``1 / d`` add up like random ones; but for picks that are equal, of which
    there are none in an image where no two norms are equal. All but :data:`STEPS`: of taking out the mean, of squares
    and norms that are rounded to fp32, of the last steps of sums; with hundreds of distances of a token that are the
    same but for rounding, it might be 12. A term whose distance is off by more than :data:`NEAR` of itself counts with
    both ends of its bounds; what others are off is bounded by its linear part and a bit more.

    Attributes:
        least: the potentials times two, fp64.
        more: what they may be beyond, where distances are small.
        error, largest: sum, and largest, of what terms are off, in units of what a distance is.
        errors, largests: of each image, no less than any of these, [I].
    """

    def __init__(self, x: Tensor, k: int) -> None:
        centred, squares, self._first = _centred(x)
        self._images = np.arange(len(x))
        self.products, self.renewals = Products(centred, k), Renewals(x, k, _after)
        equal = (np.diff(np.sort(squares, 1), axis=1) == 0).any(1)
        off, short = product_rounding(x.shape[2], x.device)
        self.each = np.float32(STEPS * UNIT + off + short)
        self.alike = np.where(equal, self.each, np.float32(STEPS * UNIT + short)) / (1 - 2 * NEAR)
        self.random = np.where(equal, np.float32(0), np.float32(off)) / (1 - 2 * NEAR)
        self.halves = (squares / 2).astype(np.float32)
        self.least, self.more = np.zeros_like(squares), np.zeros_like(squares)
        self.error, self.largest, self.sizes, self.terms = (np.zeros_like(self.halves) for _ in range(4))
        self.errors, self.largests, self.picked = np.zeros(len(x)), np.zeros(len(x)), 0

    def first(self) -> Tensor:
        return self._first

    def next(self, picks: Places) -> tuple[Places, dict[int, Places]]:
        self._add(picks)
        last, rivals = self.least.argmin(1), {}
        highest = self.least[self._images, last] + self.more[self._images, last]
        highest += 2 * self._off(slice(None), self.errors, self.largests)
        near = self.least <= highest[:, None]
        for image in range(len(last)) if np.count_nonzero(near) > len(last) else ():
            own = near[image].nonzero()[0]
            least, off = self.least[image, own], self._off(image, self.error[image, own], self.largest[image, own])
            first = least.argmin()
            own = own[least - off <= least[first] + off[first] + self.more[image, own[first]]]
            if len(own) > 1:
                rivals[image] = own
        return last, rivals

    def _add(self, picks: Places) -> None:
        sizes, terms = self.sizes, self.terms
        np.add(self.halves, self.halves[self._images, picks][:, None] + np.float32(EPSILON / 2), out=sizes)
        np.subtract(sizes, self.products.of(picks, self.least if self.picked else None, self._then), out=terms)
        np.maximum(terms, EPSILON / 2, out=terms)[self._images, picks] = np.inf
        np.reciprocal(terms, out=terms)
        sizes *= terms
        if sizes.max() * self.each > NEAR:
            self._both_ends()
        sizes *= terms
        self.least += terms
        self.least[self._images, picks] = np.inf
        self.error += sizes
        np.maximum(self.largest, sizes, out=self.largest)
        most = sizes.max(1)
        np.maximum(self.largests, most, out=self.largests)
        self.errors += most
        self.picked += 1
        if self.picked % OFTEN == 0:
            self.errors[:] = self.error.max(1)

    def _off(self, image: int | slice, error: Array, largest: Array) -> Array:
        """What potentials are off; not by the root of the product, which might leave the range of fp32."""
        off: Array = self.random[image] * np.sqrt(largest) * np.sqrt(error) + self.alike[image] * error
        return off

    def _both_ends(self) -> None:
        near = self.sizes * self.each > NEAR
        half = 1 / self.terms[near]
        off = self.each * self.sizes[near] * half  # sizes times terms, divided by the term: what a half is off
        least = (1 - STEPS * UNIT) / (half + off)
        self.more[near] += (1 + STEPS * UNIT) / np.maximum(half - off, EPSILON / 2) - least
        self.terms[near], self.sizes[near] = least, 0

    def exactly(self, image: int, rows: Places, picks: Places) -> Array:
        potential = self.renewals.of(image, rows, picks)
        self.least[image, rows] = 2 * potential * (1 - SUM)
        self.more[image, rows] = 4 * potential * SUM
        self.error[image, rows] = self.largest[image, rows] = 0
        return potential

    def _then(self, image: int, potential: Array, rows: Places, pick: int, products: Array) -> Array:
        sizes: Array = self.halves[image, rows]
        more: Array = potential + 1 / np.maximum(sizes + sizes[pick] - products, EPSILON / 2)
        return more


define(
    "sts_sample(Tensor features, Tensor member, Tensor lengths, Tensor keep) -> Tensor",
    sts_sample,
    like_member,
    kernel="vlmrewrite.kernels.greedy.sample:repulsion",
    flops=greedy_flops,
    flops_by_value=True,
    scratch=greedy_scratch,
)


@frozen_pass
class STS:
    """Keep the most diverse vision tokens before the decoder, the most relevant of them from layer ``at`` on.

    Args:
        keep: budget before the decoder: int tokens per image, or float fraction of each image's tokens.
        refine: budget from layer ``at`` on, or None for the first stage alone.
        at: layer (int) or fraction of the depth (float) of the second stage; the paper uses half.
        features: ``"projected"`` (what enters the decoder) or ``"encoder"`` (what the projector takes).
        per: what the budget is of: each ``"frame"`` (an image is one), each ``"image"`` or whole video, or all of a
            ``"row"`` together.
    """

    name: ClassVar[str] = "sts"
    tunes: ClassVar[tuple[str, ...]] = ("start",)

    keep: Budget = 192
    refine: Budget | None = 64
    at: Depth = 0.5
    features: Literal["projected", "encoder"] = "projected"
    per: Per = "image"

    @classmethod
    def tuned(cls, amount: float, draw: Draw) -> STS:
        """Any share is refined, from any layer on."""
        refine = max(0.001, round(amount * draw.share("refine", 0.05), 3))
        return cls(keep=amount, refine=refine, at=draw.layer("at", 1))

    def refuse(self, plan: Plan) -> str | None:
        """The features asked for are not there, or no vision tokens are."""
        if self.features == "encoder" and "encoder_features" not in plan.features:
            return plan.refusals.get("encoder_features", "the encoder's features cannot be reached in this model")
        return plan.exhausted()

    def change(self, plan: Plan) -> None:
        """Two selections: repulsion before layer 0, attention at layer ``at``."""
        kind = "features" if self.features == "projected" else "encoder_features"
        plan.narrow(Policy("repulsion", torch.ops.vlm.sts_sample.default, (kind,)), self.keep, per=self.per)
        if self.refine is not None and plan.exhausted(self.at) is None:
            plan.narrow(
                Policy("relevance", torch.ops.vlm.top_attention.default, ("attention",)),
                self.refine,
                self.at,
                per=self.per,
            )
