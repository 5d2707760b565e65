"""A pass whose options depend on one another."""

# --8<-- [start:pass]
from typing import ClassVar

from vlmrewrite.plan import Depth, Plan, Text, frozen_pass, layer_index


@frozen_pass
class Between:
    """Freeze the vision tokens in the layers from ``first`` up to ``last``; text goes on attending to them."""

    name: ClassVar[str] = "between"

    first: Depth
    last: Depth

    def __post_init__(self) -> None:
        if type(self.first) is type(self.last) and not self.first < self.last:
            raise ValueError(f"expected first below last, got first={self.first} and last={self.last}")

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left from layer ``first`` on."""
        return plan.exhausted(self.first)

    def change(self, plan: Plan) -> None:
        """Text runs, and sees what the layer saw before."""
        for entry in plan.layers[layer_index(self.first, plan.depth) : layer_index(self.last, plan.depth)]:
            keys = entry.keys
            entry.run_on(Text).attend_to(keys)
            # --8<-- [end:pass]
