"""DivPrune, diversity-based visual token pruning (arXiv 2503.02175), training-free.

Before the decoder, those tokens of each image are kept whose closest pair is as far apart as a greedy search finds.

    layers 0-31    run_on All  ->  layers 0-31    run_on Text | divprune

Refused where no vision tokens are left. Distance and search are the paper's: cosine, the first token is the one whose
nearest other token is farthest. Ours: ties go to the first token, a chosen token is never chosen again, and the matrix
of all distances is not kept (only its rows' extremes, block by block, for the first token).
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmrewrite.ops import define, greedy_flops, least_of, like_member, per_image
from vlmrewrite.plan import Budget, Per, Plan, Policy, frozen_pass

BLOCK = 512


def divprune_sample(features: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """Greedy max-min diversity by cosine distance (arXiv 2503.02175), each image for itself.

    The first token is the one whose smallest distance to another token is largest; then always the one is added whose
    smallest distance to the chosen ones is largest. fp32; ties go to the first token, and a zero feature is at
    distance 1 from all. O(m^2 C) once and O(m C) a step, for m tokens; at most 512 x m distances at a time.

    Args:
        features: [F, C], any float dtype.
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each image, int64 [I], sum F, on the CPU.
        keep: how many to choose of each image, int64 [I], on the CPU.

    Returns:
        the chosen tokens, bool [F].
    """
    return per_image(member, lengths, keep, lambda left, k, _: _spread(features.index_select(0, left).float(), k))


def _spread(x: Tensor, k: int) -> Tensor:
    if k == len(x):
        return torch.arange(k, device=x.device)
    x = F.normalize(x, dim=1)
    pick = _closest_other(x).argmin()
    picks = [pick]
    similarity = torch.full((len(x),), -torch.inf, device=x.device)  # to the most similar chosen token
    left = torch.ones(len(x), dtype=torch.bool, device=x.device)
    for _ in range(k - 1):
        similarity = similarity.maximum((x * x.index_select(0, pick[None])).sum(1))
        left.index_fill_(0, pick[None], False)
        pick = least_of(similarity, left)
        picks.append(pick)
    return torch.stack(picks)


def _closest_other(x: Tensor) -> Tensor:
    """Cosine of each row of x [m, C] to its most similar other row; each pair is computed once, so ties stay ties."""
    best = torch.full((len(x),), -torch.inf, device=x.device)
    for start in range(0, len(x), BLOCK):
        with torch.autocast(x.device.type, enabled=False):
            pairs = x[start : start + BLOCK] @ x[start:].T
        pairs.masked_fill_(torch.ones_like(pairs, dtype=torch.bool).tril(), -torch.inf)
        rows = best[start : start + BLOCK]
        rows.copy_(rows.maximum(pairs.amax(1)))
        best[start:] = best[start:].maximum(pairs.amax(0))
    return best


define(
    "divprune_sample(Tensor features, Tensor member, Tensor lengths, Tensor keep) -> Tensor",
    divprune_sample,
    like_member,
    kernel="vlmrewrite.kernels.greedy.sample:cosine",
    flops=greedy_flops,
    flops_by_value=True,
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

    keep: Budget = 0.1
    per: Per = "image"

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left."""
        return plan.exhausted()

    def change(self, plan: Plan) -> None:
        """One selection on the projected features."""
        plan.narrow(Policy("divprune", torch.ops.vlm.divprune_sample.default, ("features",)), self.keep, per=self.per)
