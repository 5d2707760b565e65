"""A pass that drops vision tokens early and takes some of them back later: `narrow`, then `widen`."""

# --8<-- [start:pass]
from typing import ClassVar

import torch

import vlmrewrite.passes  # noqa: F401  # for its operators
from vlmrewrite.plan import Budget, Depth, Plan, Policy, Vision, frozen_pass, layer_index


@frozen_pass
class SecondLook:
    """Keep evenly spaced vision tokens; from layer ``at`` on, ``back`` of the others too."""

    name: ClassVar[str] = "secondlook"

    keep: Budget = 0.5
    back: Budget = 8
    at: Depth = 0.5

    def refuse(self, plan: Plan) -> str | None:
        """An earlier pass drops vision tokens."""
        return None if plan.vision() == Vision else "an earlier pass drops vision tokens"

    def change(self, plan: Plan) -> None:
        """One selection before the decoder, one of what it dropped at layer ``at``."""
        layer = layer_index(self.at, plan.depth)
        kept = plan.narrow(Policy("spread", torch.ops.vlm.stride_sample), self.keep)
        asked = Policy("asked", torch.ops.vlm.top_attention, ("attention_outside",))
        if kept != Vision:
            plan.widen(kept, (Vision - kept).select(asked, self.back, at=layer), layer)
        # --8<-- [end:pass]
