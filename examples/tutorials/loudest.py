"""An operator of one's own: the tokens of each image with the largest features, and a pass that goes by it."""

# --8<-- [start:reference]
from typing import ClassVar

import torch
from torch import Tensor

from vlmrewrite.ops import define, like_member, per_image
from vlmrewrite.plan import Budget, Depth, Plan, Policy, frozen_pass


def loudest(features: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """The tokens of each image with the largest norm; ties go to the first token.

    Args:
        features: [F, C], any float dtype.
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each image, int64 [I], sum F, on the CPU.
        keep: how many to choose of each image, int64 [I], on the CPU.

    Returns:
        the chosen tokens, bool [F].
    """
    size = features.float().square().sum(1)
    return per_image(member, lengths, keep, lambda left, k, _: size[left].argsort(descending=True, stable=True)[:k])


# --8<-- [end:reference]
# --8<-- [start:define]
define(
    "loudest(Tensor features, Tensor member, Tensor lengths, Tensor keep) -> Tensor",
    loudest,
    like_member,  # shapes alone: one bool for each token, as `member` has
    kernel="examples.tutorials.loudest_kernel:loudest",
    flops=lambda features, *_, **__: 2 * features[0] * features[1],
)
# --8<-- [end:define]


# --8<-- [start:pass]
@frozen_pass
class Loudest:
    """Keep the vision tokens with the largest features, from layer ``at`` on."""

    name: ClassVar[str] = "loudest"

    keep: Budget
    at: Depth = 0

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left from layer ``at`` on."""
        return plan.exhausted(self.at)

    def change(self, plan: Plan) -> None:
        """One selection."""
        plan.narrow(Policy("loudest", torch.ops.vlm.loudest, ("features",)), self.keep, self.at)


# --8<-- [end:pass]
