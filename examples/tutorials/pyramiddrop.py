"""PyramidDrop (arXiv 2410.17247) as a pass: fewer and fewer vision tokens, the deeper the layer.

Every stage ends by dropping a share of the vision tokens that are left, those that the last prompt token attends to
least.

    layers 0-7     run_on All  ->  layers 0-7     run_on All
    layers 8-15    run_on All      layers 8-15    run_on Text | pyramid
    layers 16-23   run_on All      layers 16-23   run_on Text | pyramid2
    layers 24-31   run_on All      layers 24-31   run_on Text | pyramid3
"""

# --8<-- [start:pass]
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from vlmrewrite.plan import Layers, Plan, Policy, chosen_layers, frozen_pass


@frozen_pass
class PyramidDrop:
    """Drop the share ``drop`` of the vision tokens that are left, at each of the layers ``at``."""

    name: ClassVar[str] = "pyramiddrop"

    drop: Annotated[float, Field(gt=0, lt=1)] = 0.5
    at: Layers = (0.25, 0.5, 0.75)

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left at the first of the layers."""
        return plan.exhausted(chosen_layers(self.at, plan.depth)[0])

    def change(self, plan: Plan) -> None:
        """One selection at each layer that has vision tokens, of what the one before it left."""
        ranked = Policy("pyramid", torch.ops.vlm.top_attention, ("attention",))
        for stage, layer in enumerate(chosen_layers(self.at, plan.depth), start=1):
            if plan.exhausted(layer) is None:
                plan.narrow(ranked, (1 - self.drop) ** stage, layer)
        # --8<-- [end:pass]


# --8<-- [start:try]
def try_it() -> None:
    """Plan, numbers and generation of the pass, on a tiny model."""
    import vlmrewrite as vr
    from vlmrewrite.testing import FAMILIES, Row, generation_agreement

    tiny = FAMILIES["llava"](layers=4)
    inputs = tiny.inputs([Row(images=1), Row(images=2, before=3, after=1)], side="left")
    print(vr.rewrite(vr.trace(tiny.model, inputs), PyramidDrop()))
    print(vr.verify(tiny.model, inputs, PyramidDrop()))  # the largest difference of a logit from the oracle
    generation_agreement(tiny.model, inputs, PyramidDrop()).check()  # raises beyond what rounding explains


# --8<-- [end:try]

if __name__ == "__main__":
    try_it()
