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

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from vlmrewrite.draw import Draw
from vlmrewrite.ops import (
    SIDE,
    Array,
    Products,
    added_in_order,
    define,
    greedy_choice,
    greedy_flops,
    greedy_scratch,
    least_of,
    like_member,
    pairwise,
    product_rounding,
)
from vlmrewrite.plan import Budget, Depth, Per, Plan, Policy, frozen_pass

EPSILON = 1e-6


def sts_sample(features: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """Greedy repulsion sampling (arXiv 2606.03569, section 3, stage 1), each image for itself.

    The first token is the one nearest to the mean; then always the one with the smallest potential
    ``U(i) = sum over chosen j of 1 / (|v_i - v_j|^2 + 1e-6)`` is added. Distances and sums are fp32; ties go to the
    first token.

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
    potential, left = torch.zeros(len(x), device=x.device), torch.ones(len(x), dtype=torch.bool, device=x.device)
    pick = _squares(x, x.mean(0)).argmin()
    picks = [pick]
    for _ in range(k - 1):
        potential += 1 / (_squares(x, x.index_select(0, pick[None])) + EPSILON)
        left = left.index_fill(0, pick[None], False)
        pick = least_of(potential, left)
        picks.append(pick)
    return torch.stack(picks)


def _squares(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).square_().sum(1)


class _Repulsion:
    """Bounds of the potentials by ``|x - y|^2 = |x|^2 + |y|^2 - 2 xy``, the mean taken out, so that less cancels.

    Products, squares and differences are off by at most ``product_rounding(C) (|x|^2 + |y|^2)``: each has its own share
    of the 12 deviations in there. A sum of potentials is off by ``product_rounding(k)`` of itself.
    """

    def __init__(self, x: Tensor, k: int) -> None:
        self.x, self.mean = x, torch.stack([one.mean(0) for one in x])
        centred = x - self.mean[:, None]
        self.products = Products(centred, k)
        squares, off = self.products.squares().cpu().numpy(), product_rounding(x.shape[2], x.device)
        sign = np.array([1, -1], np.float32)[:, None, None]  # farther is less: the lower bound first
        self.sums: Array = squares * (1 + sign * off) + EPSILON / 2
        self.factor = 1 - sign * product_rounding(k, x.device)

    def first(self) -> Tensor:
        pairs = zip(self.x, self.mean, strict=True)
        return torch.stack([torch.cat([_squares(some, mean) for some in x.split(SIDE)]) for x, mean in pairs])

    def bounded(self, bounds: Array | None, picks: Sequence[int]) -> Array:
        more: Array = self.sums + self.sums[:, np.arange(len(picks)), picks][:, :, None]
        more -= 2 * self.products.of(picks, None if bounds is None else bounds[0], self._then)
        np.reciprocal(np.maximum(more, EPSILON, out=more), out=more)
        more *= self.factor
        return more if bounds is None else np.add(bounds, more, out=bounds)

    def _then(self, image: int, potential: Array, rows: npt.NDArray[np.intp], pick: int, products: Array) -> Array:
        sums: Array = self.sums[0, image, rows]
        more: Array = potential + 1 / np.maximum(sums + sums[pick] - 2 * products, EPSILON)
        return more

    def exactly(self, potential: Tensor | None, rows: Tensor, picks: Tensor) -> Tensor:
        more = 1 / (pairwise(_squares, picks, rows) + EPSILON)
        return added_in_order(torch.zeros_like(more[0]) if potential is None else potential, more)


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
