"""Random: the control that every pruning technique should beat; keeps a random subset of each image's tokens.

    layers 8-31    run_on All  ->  layers 8-31    run_on Text | random

Refused where no vision tokens are left. Own.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vlmrewrite.ops import define, like_member, per_image
from vlmrewrite.plan import Budget, Depth, Per, Plan, Policy, frozen_pass


def random_sample(ordinal: Tensor, member: Tensor, lengths: Tensor, keep: Tensor, seed: int) -> Tensor:
    """A random subset of each image's tokens; depends on the seed and the image's number in its row, nothing else.

    Args:
        ordinal: number of each image within its row, int64 [I], on the CPU.
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each image, int64 [I], sum F, on the CPU.
        keep: how many to choose of each image, int64 [I], on the CPU.
        seed: of the generator, 0 <= seed < 2**32.

    Returns:
        the chosen tokens, bool [F].
    """
    ordinals = ordinal.tolist()

    def choose(left: Tensor, k: int, image: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + ordinals[image])
        return torch.randperm(len(left), generator=generator)[:k].to(left.device)

    return per_image(member, lengths, keep, choose)


define(
    "random_sample(Tensor ordinal, Tensor member, Tensor lengths, Tensor keep, int seed) -> Tensor",
    random_sample,
    like_member,
)


@frozen_pass
class Random:
    """Keep a random subset of the vision tokens from layer ``at`` on.

    Args:
        keep: int tokens per image, or float fraction of each image's tokens.
        at: layer (int) or fraction of the depth (float).
        seed: int in 0 .. 2**32 - 1; the same seed keeps the same tokens.
        per: what the budget is of: each ``"frame"`` (an image is one), each ``"image"`` or whole video, or all of a
            ``"row"`` together.
    """

    name: ClassVar[str] = "random"
    control: ClassVar[bool] = True

    keep: Budget
    at: Depth = 0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    per: Per = "image"

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left from layer ``at`` on."""
        return plan.exhausted(self.at)

    def change(self, plan: Plan) -> None:
        """One selection."""
        op = torch.ops.vlm.random_sample.default
        plan.narrow(Policy("random", op, ("ordinal",), (self.seed,)), self.keep, self.at, per=self.per)
