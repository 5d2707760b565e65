"""Stride: the uniform control; keeps evenly spaced tokens of each image.

    layers 0-31    run_on All  ->  layers 0-31    run_on Text | stride

Refused where no vision tokens are left. Own.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vlmrewrite.draw import Draw
from vlmrewrite.ops import define, like_member, per_image
from vlmrewrite.plan import Budget, Depth, Per, Plan, Policy, frozen_pass


def stride_sample(member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """Of each image's n tokens that are left, those at floor(i * n / k) for i < k.

    Args:
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each image, int64 [I], sum F, on the CPU.
        keep: how many to choose of each image, k, int64 [I], on the CPU.

    Returns:
        the chosen tokens, bool [F].
    """
    return per_image(member, lengths, keep, lambda left, k, _: torch.arange(k, device=left.device) * len(left) // k)


define("stride_sample(Tensor member, Tensor lengths, Tensor keep) -> Tensor", stride_sample, like_member)


@frozen_pass
class Stride:
    """Keep evenly spaced vision tokens from layer ``at`` on.

    Args:
        keep: int tokens per image, or float fraction of each image's tokens.
        at: layer (int) or fraction of the depth (float).
        per: what the budget is of: each ``"frame"`` (an image is one), each ``"image"`` or whole video, or all of a
            ``"row"`` together.
    """

    name: ClassVar[str] = "stride"
    tunes: ClassVar[tuple[str, ...]] = ("start", "later")
    control: ClassVar[bool] = True

    keep: Budget
    at: Depth = 0
    per: Per = "image"

    @classmethod
    def tuned(cls, amount: float, draw: Draw) -> Stride:
        """From any layer on."""
        return cls(keep=amount, at=draw.layer("at"))

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left from layer ``at`` on."""
        return plan.exhausted(self.at)

    def change(self, plan: Plan) -> None:
        """One selection."""
        plan.narrow(Policy("stride", torch.ops.vlm.stride_sample.default), self.keep, self.at, per=self.per)
