"""An operator of two inputs and an option, a pass that asks for both, and one that asks for what few models have."""

# --8<-- [start:operator]
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vlmrewrite.ops import define, like_member, per_image
from vlmrewrite.plan import Budget, Depth, Plan, Policy, frozen_pass


def loud_and_seen(
    features: Tensor, attention: Tensor, member: Tensor, lengths: Tensor, keep: Tensor, power: float
) -> Tensor:
    """The tokens of each image with the largest ``|features| * attention ** power``; ties go to the first token."""
    score = features.float().norm(dim=1) * attention**power
    return per_image(member, lengths, keep, lambda left, k, _: score[left].argsort(descending=True, stable=True)[:k])


define(
    "loud_and_seen(Tensor features, Tensor attention, Tensor member, Tensor lengths, Tensor keep, float power)"
    " -> Tensor",
    loud_and_seen,
    like_member,
)
# --8<-- [end:operator]


# --8<-- [start:pass]
@frozen_pass
class LoudAndSeen:
    """Keep the vision tokens that are loud and attended to, at layer ``at``."""

    name: ClassVar[str] = "loudandseen"

    keep: Budget
    at: Depth = 0.5
    power: Annotated[float, Field(ge=0)] = 1.0

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left from layer ``at`` on."""
        return plan.exhausted(self.at)

    def change(self, plan: Plan) -> None:
        """One selection: `needs` in the order of the operator's arguments, `options` behind `keep`."""
        policy = Policy("loud and seen", torch.ops.vlm.loud_and_seen, ("features", "attention"), (self.power,))
        plan.narrow(policy, self.keep, self.at)


# --8<-- [end:pass]


# --8<-- [start:lacking]
@frozen_pass
class LoudInTheEncoder:
    """Keep the vision tokens that were loudest before the projector, in models that tell."""

    name: ClassVar[str] = "loudintheencoder"

    keep: Budget

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left; whether the encoder's features are there, the plan looks itself."""
        return plan.exhausted()

    def change(self, plan: Plan) -> None:
        """One selection."""
        asked = ("encoder_features", "attention")
        plan.narrow(Policy("loud", torch.ops.vlm.loud_and_seen, asked, (0.0,)), self.keep)


# --8<-- [end:lacking]
