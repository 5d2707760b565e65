"""ShortV, freezing visual tokens in ineffective layers (arXiv 2504.00502), training-free.

In the layers named, vision tokens are not updated; the text still attends to them as they are.

    layer 5        run_on All  ->  layer 5        run_on Text, attend_to All

Refused where none of the layers runs on vision tokens any more. The paper picks the layers for each model, those whose
work on vision tokens changes the output least over a few samples, about 60 % of them; here they are given.
"""

from __future__ import annotations

from typing import ClassVar

from vlmrewrite.draw import Draw
from vlmrewrite.plan import Layers, Plan, Text, chosen_layers, frozen_pass


@frozen_pass
class ShortV:
    """Freeze the vision tokens in some layers; text goes on attending to them there.

    Args:
        layers: list of layers (int) or fractions of the depth (float), or a float: the share of the layers to freeze
            them in, evenly spaced.
    """

    name: ClassVar[str] = "shortv"
    tunes: ClassVar[tuple[str, ...]] = ("layers",)

    layers: Layers

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("expected at least one layer to freeze vision tokens in, got layers=[]")

    @classmethod
    def tuned(cls, amount: float, draw: Draw) -> ShortV:
        """They are frozen in the layers where it matters least."""
        order = sorted(range(draw.depth), key=lambda i: draw.freeze[i])
        return cls(layers=tuple(sorted(order[: max(1, round((1 - amount) * draw.depth))])))

    def refuse(self, plan: Plan) -> str | None:
        """Vision tokens are frozen or gone in all of the layers."""
        frozen = chosen_layers(self.layers, plan.depth)
        if all(plan.layer(i).run_set == Text for i in frozen):
            return f"an earlier pass leaves no vision tokens to freeze in layers {', '.join(map(str, frozen))}"
        return None

    def change(self, plan: Plan) -> None:
        """Text runs and sees what the layer saw before."""
        for i in chosen_layers(self.layers, plan.depth):
            entry = plan.layer(i)
            keys = entry.keys
            entry.run_on(Text).attend_to(keys)
