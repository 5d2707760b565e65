"""DPVR, Dual-Path Vision Token Routing with late-layer fusion (arXiv 2606.09131); its branch is trained.

Vision tokens leave the stream once they are saturated, go through one decoder layer of their own, and are back for the
last layers, which fuse both streams.

    layers 0-31    run_on All   ->   branch Vision from layer 18 to 31 through dpvr, a layer like 18 (copy)
                                     layers 0-17    run_on All
                                     layers 18-30   run_on Text
                                     layer 31       run_on All

Refused where an earlier pass leaves no vision tokens. The paper's: the routing, one layer as the branch, one fusion
layer, layer 18 of 32. Left open by the paper and decided here: the branch starts as a copy of layer ``at`` and its
tokens keep their positions and see one another causally; decoding uses the cache, where the paper's runs a full
forward for each token.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator
from torch import nn

from vlmrewrite.draw import Draw
from vlmrewrite.plan import Depth, LayerCopy, Plan, check_depth, frozen_pass, layer_index
from vlmrewrite.report import calibration


def _depth_or_auto(value: object) -> int | float | str:
    return "auto" if value == "auto" else check_depth(value, " or 'auto'")


@frozen_pass
class DPVR:
    """Take the vision tokens through a branch of one layer instead of layers ``at`` .. depth - ``fuse`` - 1.

    Args:
        at: the layer where they leave (int) or fraction of the depth (float); the paper's 18 of 32 is 0.5625.
            ``"auto"``: where updating them hardly matters any more, see :meth:`LayerProfile.saturation`.
        fuse: how many of the last layers they are back for; with 0 the branch is never read, and never learns.
        branch: ``"copy"``: a layer that starts with layer ``at``'s parameters; ``"random"``: as the model's class
            initialises them; ``"identity"``: nothing, the tokens come back as they left.
        calibration: what the model's forward takes, with images, to measure the layers on; with ``"auto"``.
    """

    name: ClassVar[str] = "dpvr"
    tunes: ClassVar[tuple[str, ...]] = ("layers",)

    at: Annotated[Depth | Literal["auto"], PlainValidator(_depth_or_auto)] = 0.5625
    fuse: Annotated[int, Field(ge=0)] = 1
    branch: Literal["copy", "random", "identity"] = "copy"
    calibration: Annotated[Any, Field(exclude=True)] = dataclasses.field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.calibration is not None and self.at != "auto":
            raise ValueError(f"calibration inputs are for at='auto', got at={self.at!r}")

    def calibrated(self, model: nn.Module, inputs: Any = None) -> DPVR:
        """The pass with the layer that "auto" stands for on this model; see :func:`vlmrewrite.calibrate`."""
        if self.at != "auto":
            return self
        found = calibration(model, self.calibration if inputs is None else inputs, "DPVR(at='auto')")
        if self.fuse > found.depth:
            depth = found.depth
            raise ValueError(f"fuse={self.fuse}; expected fuse in 0 .. {depth} for a decoder of {depth} layers")
        return dataclasses.replace(self, at=min(found.saturation(), found.depth - self.fuse), calibration=None)

    @classmethod
    def tuned(cls, amount: float, draw: Draw) -> DPVR:
        """Without a branch, which would have to be trained."""
        fuse = draw.pick("fuse", (1, 2))
        return cls(at=min(int(amount * draw.depth), draw.depth - fuse), fuse=fuse, branch="identity")

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left, or another branch is open."""
        if self.at == "auto":
            return None
        return plan.exhausted(self.at) or plan.branched(self.at, plan.depth - self.fuse)

    def change(self, plan: Plan) -> None:
        """One branch."""
        if self.at == "auto":
            raise ValueError("DPVR(at='auto') must be calibrated first: vlmrewrite.calibrate(model, recipe, inputs)")
        first, rejoin = layer_index(self.at, plan.depth), plan.depth - self.fuse
        if first > rejoin:
            raise ValueError(
                f"fuse={self.fuse} would bring the vision tokens back before layer {first}, where they leave; expected"
                f" fuse in 0 .. {plan.depth - first} for a decoder of {plan.depth} layers"
            )
        block = None if self.branch == "identity" else LayerCopy(first, self.branch)
        plan.branch(plan.vision(first), first, rejoin, block)
