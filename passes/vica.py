"""ViCA, vision-only cross-attention (arXiv 2602.07574), here with the model's own weights and no training.

Vision tokens stay as the projector made them; in a few layers the text attends to them, in the others it does not.

    layers 0-1     run_on All  ->  layers 0-1     run_on Text, attend_to All
    layers 2-6     run_on All      layers 2-6     run_on Text

Refused where no vision tokens are left, and without `cross` in a decoder for which the paper names no layers. The
layers are the paper's, for 7B (32 layers) and 13B (40). Ours: the model's own weights, one softmax over vision and text
keys, original positions.
"""

from __future__ import annotations

from typing import ClassVar

from vlmrewrite.draw import Draw
from vlmrewrite.plan import Layers, Plan, Text, chosen_layers, frozen_pass

CROSS = {32: (0, 1, 7, 8, 9, 10, 11, 14), 40: (0, 6, 8, 9, 10, 13, 14, 16)}


@frozen_pass
class ViCA:
    """Never update vision tokens; text attends to them in the ``cross`` layers only.

    Args:
        cross: list of layers (int) or fractions of the depth (float), or a float: the share of the layers, evenly
            spaced. None: the paper's layers, for decoders of 32 and 40.
    """

    name: ClassVar[str] = "vica"
    tunes: ClassVar[tuple[str, ...]] = ("layers",)

    cross: Layers | None = None

    def __post_init__(self) -> None:
        if self.cross == ():
            raise ValueError("expected at least one layer in which text attends to vision tokens, got cross=[]")

    @classmethod
    def tuned(cls, amount: float, draw: Draw) -> ViCA:
        """Text sees them in the layers where it matters most."""
        order = sorted(range(draw.depth), key=lambda i: -draw.hide[i])
        return cls(cross=tuple(sorted(order[: max(1, round(amount * draw.depth))])))

    def refuse(self, plan: Plan) -> str | None:
        """No layers are known for this depth, or no vision tokens are left."""
        if self.cross is None and plan.depth not in CROSS:
            return f"cross layers are published for 32 and 40 decoder layers, this model has {plan.depth}; give `cross`"
        return plan.exhausted()

    def change(self, plan: Plan) -> None:
        """Text runs everywhere, and sees what the layer saw before where it crosses."""
        cross = chosen_layers(CROSS[plan.depth] if self.cross is None else self.cross, plan.depth)
        for entry in plan.layers:
            keys = entry.keys if entry.index in cross else Text
            entry.run_on(Text).attend_to(keys)
