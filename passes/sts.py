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

import torch
from torch import Tensor

from vlmrewrite.ops import define, greedy_flops, least_of, like_member, per_image
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
    return per_image(member, lengths, keep, lambda left, k, _: _repel(features.index_select(0, left).float(), k))


def _repel(x: Tensor, k: int) -> Tensor:
    if k == len(x):
        return torch.arange(k, device=x.device)
    potential, left = torch.zeros(len(x), device=x.device), torch.ones(len(x), dtype=torch.bool, device=x.device)
    pick = (x - x.mean(0)).square().sum(1).argmin()
    picks = [pick]
    for _ in range(k - 1):
        potential += 1 / ((x - x.index_select(0, pick[None])).square_().sum(1) + EPSILON)
        left.index_fill_(0, pick[None], False)
        pick = least_of(potential, left)
        picks.append(pick)
    return torch.stack(picks)


define(
    "sts_sample(Tensor features, Tensor member, Tensor lengths, Tensor keep) -> Tensor",
    sts_sample,
    like_member,
    kernel="vlmrewrite.kernels.greedy.sample:repulsion",
    flops=greedy_flops,
    flops_by_value=True,
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

    keep: Budget = 192
    refine: Budget | None = 64
    at: Depth = 0.5
    features: Literal["projected", "encoder"] = "projected"
    per: Per = "image"

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
