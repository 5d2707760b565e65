"""Random: the control that every pruning technique should beat; keeps a random subset of each image's tokens.

    layers 8-31    run_on All  ->  layers 8-31    run_on Text | random

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


def random_sample(ordinal: Tensor, member: Tensor, lengths: Tensor, keep: Tensor, seed: int) -> Tensor:
    """A random subset of each image's tokens; depends on the seed and the image's number in its row, nothing else.

    Args:
        ordinal: number of each image within its row, int64 [I], on the CPU.
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each image, int64 [I], sum F, on the CPU.
        keep: how many to choose of each image, int64 [I], on the CPU.
        seed: of the generator.

    Returns:
        the chosen tokens, bool [F].
    """
    chosen = torch.zeros_like(member)
    start = 0
    for o, n, k in zip(ordinal.tolist(), lengths.tolist(), keep.tolist(), strict=True):
        left = member[start : start + n].nonzero()[:, 0]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + o)
        order = torch.randperm(len(left), generator=generator).to(left.device)
        chosen[start + left[order[:k]]] = True
        start += n
    return chosen


def _fake(ordinal: Tensor, member: Tensor, lengths: Tensor, keep: Tensor, seed: int) -> Tensor:
    return torch.empty_like(member)


define(
    "random_sample(Tensor ordinal, Tensor member, Tensor lengths, Tensor keep, int seed) -> Tensor",
    random_sample,
    _fake,
)


@frozen_pass
class Random:
    """Keep a random subset of the vision tokens from layer ``at`` on.

    Args:
        keep: int tokens per image, or float fraction of each image's tokens.
        at: layer (int) or fraction of the depth (float).
        seed: the same seed keeps the same tokens.
    """

    name: ClassVar[str] = "random"

    keep: Budget
    at: Depth = 0
    seed: int = 0

    def refuse(self, plan: Plan) -> str | None:
        """Never."""
        return None

    def change(self, plan: Plan) -> None:
        """One selection."""
        op = torch.ops.vlm.random_sample.default
        plan.narrow(Policy("random", op, ("ordinal",), (self.seed,)), self.keep, self.at)
