"""Stride: the uniform control; keeps evenly spaced tokens of each image.

    layers 0-31    run_on All  ->  layers 0-31    run_on Text | stride

Never refused. Own.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vlmrewrite.budget import Budget, Depth, frozen_pass
from vlmrewrite.dialect import define
from vlmrewrite.plan import Plan
from vlmrewrite.tokens import Policy


def stride_sample(member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """Of each image's n tokens that are left, those at floor(i * n / k) for i < k.

    Args:
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each image, int64 [I], sum F, on the CPU.
        keep: how many to choose of each image, k, int64 [I], on the CPU.

    Returns:
        the chosen tokens, bool [F].
    """
    chosen = torch.zeros_like(member)
    start = 0
    for n, k in zip(lengths.tolist(), keep.tolist(), strict=True):
        left = member[start : start + n].nonzero()[:, 0]
        k = min(k, len(left))
        if k:
            chosen[start + left[torch.arange(k, device=left.device) * len(left) // k]] = True
        start += n
    return chosen


def _fake(member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    return torch.empty_like(member)


define("stride_sample(Tensor member, Tensor lengths, Tensor keep) -> Tensor", stride_sample, _fake)


@frozen_pass
class Stride:
    """Keep evenly spaced vision tokens from layer ``at`` on.

    Args:
        keep: int tokens per image, or float fraction of each image's tokens.
        at: layer (int) or fraction of the depth (float).
    """

    name: ClassVar[str] = "stride"

    keep: Budget
    at: Depth = 0

    def refuse(self, plan: Plan) -> str | None:
        """Never."""
        return None

    def change(self, plan: Plan) -> None:
        """One selection."""
        plan.narrow(Policy("stride", torch.ops.vlm.stride_sample.default), self.keep, self.at)
