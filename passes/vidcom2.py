"""VidCom2, "Video Compression Commander" (arXiv 2505.14454, section 3), training-free.

    layers 0-31    run_on All  ->  layers 0-31    run_on Text | vidcom2

Refused where no vision tokens are left. A frame that differs from the rest of its video keeps more of its tokens, and
a token that differs from its video and from its frame is kept before others. An image is a video of one frame, of which
the tokens stay that differ most from their mean. The paper scores the features behind the projector, as is done here,
and rounds each frame's share by itself; here the frames of a video share its budget exactly.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmrewrite.draw import Draw
from vlmrewrite.ops import define, like_member, per_image, shared_out
from vlmrewrite.plan import Budget, Plan, Policy, frozen_pass

TEMPERATURE = 0.01


def vidcom2_sample(features: Tensor, frame: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """The tokens that differ most from their video and their frame, more of frames that differ; fp32.

    Args:
        features: [F, C], any float dtype.
        frame: number of each token's frame, int64 [F].
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each video, int64 [I], sum F, on the CPU.
        keep: how many to choose of each video, int64 [I], on the CPU.

    Returns:
        the chosen tokens, bool [F].
    """

    def choose(left: Tensor, k: int, _: int) -> Tensor:
        x = features.index_select(0, left).float()
        _, frames, sizes = frame.index_select(0, left).unique(return_inverse=True, return_counts=True)
        means = x.new_zeros(len(sizes), x.shape[1]).index_add_(0, frames, x) / sizes[:, None]
        apart = -F.cosine_similarity(x, x.mean(0, keepdim=True))
        unique = x.new_zeros(len(sizes)).index_add_(0, frames, apart) / sizes
        weights = sizes * (1 + (unique / TEMPERATURE).softmax(0) - 1 / len(sizes))
        parts = shared_out(weights, sizes, k).to(left.device)
        order = (apart - F.cosine_similarity(x, means[frames])).argsort(descending=True, stable=True)
        order = order[frames[order].argsort(stable=True)]
        rank = torch.arange(len(left), device=left.device) - (sizes.cumsum(0) - sizes)[frames[order]]
        return order[rank < parts[frames[order]]]

    return per_image(member, lengths, keep, choose)


define(
    "vidcom2_sample(Tensor features, Tensor frame, Tensor member, Tensor lengths, Tensor keep) -> Tensor",
    vidcom2_sample,
    like_member,
)


@frozen_pass
class VidCom2:
    """Keep the vision tokens that differ most from their video and their frame, before the decoder.

    Args:
        keep: int tokens per video or image, or float fraction of each one's tokens; the paper's R.
    """

    name: ClassVar[str] = "vidcom2"
    tunes: ClassVar[tuple[str, ...]] = ("start",)

    keep: Budget = 0.25

    @classmethod
    def tuned(cls, amount: float, draw: Draw) -> VidCom2:
        """Nothing is drawn."""
        return cls(keep=amount)

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left."""
        return plan.exhausted()

    def change(self, plan: Plan) -> None:
        """One selection on the projected features."""
        plan.narrow(Policy("vidcom2", torch.ops.vlm.vidcom2_sample.default, ("features", "frame")), self.keep)
