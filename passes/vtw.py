"""VTW, visual tokens withdrawal (arXiv 2405.05803), training-free.

From layer `at` on, no vision token is computed or attended to; what the text has taken up by then must do.

    layers 16-31   run_on All  ->  layers 16-31   run_on Text

Refused where an earlier pass leaves none to withdraw. The paper finds the layer for each model, the first at which
withdrawal hardly changes the output distribution on a few samples; half of the depth is our default, not its search.
`VTW(at=0)` is the control that never shows the image to the decoder.
"""

from __future__ import annotations

from typing import ClassVar

from vlmrewrite.draw import Draw
from vlmrewrite.plan import Depth, Plan, Text, frozen_pass, layer_index


@frozen_pass
class VTW:
    """Drop all vision tokens from layer ``at`` on.

    Args:
        at: layer (int) or fraction of the depth (float).
    """

    name: ClassVar[str] = "vtw"
    tunes: ClassVar[tuple[str, ...]] = ("layers",)

    at: Depth = 0.5

    @classmethod
    def tuned(cls, amount: float, draw: Draw) -> VTW:
        """Vision tokens stay for that share of the layers."""
        return cls(at=min(int(amount * draw.depth), draw.depth - 1))

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left from layer ``at`` on."""
        return plan.exhausted(self.at)

    def change(self, plan: Plan) -> None:
        """Text only, from layer ``at`` on."""
        for entry in plan.layers[layer_index(self.at, plan.depth) :]:
            entry.run_on(Text).attend_to(Text)
