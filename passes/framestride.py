"""FrameStride: the uniform control for videos; as many tokens of each frame, evenly spaced.

    layers 0-31    run_on All  ->  layers 0-31    run_on Text | framestride

Refused where no vision tokens are left. Own. An image is a video of one frame.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vlmrewrite.ops import define, like_member, per_image, shared_out
from vlmrewrite.plan import Budget, Depth, Plan, Policy, frozen_pass


def framestride_sample(frame: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """Of each video's tokens that are left as many of each frame, if it has them: of n those at floor(i * n / k).

    Args:
        frame: number of each token's frame, int64 [F].
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each video, int64 [I], sum F, on the CPU.
        keep: how many to choose of each video, int64 [I], on the CPU.

    Returns:
        the chosen tokens, bool [F].
    """

    def choose(left: Tensor, k: int, _: int) -> Tensor:
        _, frames, sizes = frame.index_select(0, left).unique(return_inverse=True, return_counts=True)
        parts = shared_out(torch.ones(len(sizes)), sizes, k).to(left.device)[frames]
        n, place = sizes[frames], torch.arange(len(left), device=left.device) - (sizes.cumsum(0) - sizes)[frames]
        first = (place * parts + n - 1) // n  # the first i for which i * n / parts is not before this place
        chosen: Tensor = first * n < (place + 1) * parts
        return chosen.nonzero()[:, 0]

    return per_image(member, lengths, keep, choose)


define(
    "framestride_sample(Tensor frame, Tensor member, Tensor lengths, Tensor keep) -> Tensor",
    framestride_sample,
    like_member,
)


@frozen_pass
class FrameStride:
    """Keep evenly spaced tokens of each frame from layer ``at`` on.

    Args:
        keep: int tokens per image or video, or float fraction of each one's tokens.
        at: layer (int) or fraction of the depth (float).
    """

    name: ClassVar[str] = "framestride"

    keep: Budget
    at: Depth = 0

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left from layer ``at`` on."""
        return plan.exhausted(self.at)

    def change(self, plan: Plan) -> None:
        """One selection."""
        plan.narrow(Policy("framestride", torch.ops.vlm.framestride_sample.default, ("frame",)), self.keep, self.at)
