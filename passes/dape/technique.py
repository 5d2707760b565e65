"""DAPE, dynamic non-uniform alignment and progressive detail enhancement; training-free, or with trained blocks.

Each image is covered by regions of 1, 2 x 2 and 4 x 4 tokens, small where the text matches and where there is much to
see; one token, the region's average, stands for each. At an eighth, a quarter and half of the depth, the regions that
the last prompt token attends to most get detail: they are split further, or take up their full-resolution features.

    layers 0-31    run_on All  ->  cover = Vision.select(cover, keep=0.5) at layer 0
                                   pool edits cover at layer 0
                                   layers 0-3     run_on Text | cover
                                   layers 4-7     run_on Text | (cover | split)       and so on; or, with "inject":
                                   detail edits cover at layer 4                      the length stays the same

Refused where the grid of an image's tokens is not known, and after a pass that drops vision tokens. The technique is
known here from a summary alone: **every formula is this project's own** (:mod:`vlmrewrite.passes.dape.ops`).
No trained weights exist: a block for the match starts as a random projection of the training-free one, a block for
detail adds nothing. The loss to train them by is :func:`vlmrewrite.passes.dape.losses.dape_loss`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Annotated, Any, ClassVar, Literal

from pydantic import PlainValidator
from torch import Tensor, nn

from vlmrewrite.draw import Draw
from vlmrewrite.errors import shown
from vlmrewrite.passes.dape import ops
from vlmrewrite.passes.dape.blocks import Detail, Matching
from vlmrewrite.plan import (
    Budget,
    Edit,
    Plan,
    Policy,
    TokenSet,
    Vision,
    Weights,
    frozen_pass,
    layer_index,
)

DEPTHS = (0.125, 0.25, 0.5)

POOL, POOL_NEEDS = ops.POOL, ("stream", "flat", "lengths", "grid")


def _shares(value: object) -> tuple[float, ...]:
    if isinstance(value, list | tuple) and len(value) <= len(DEPTHS) and all(map(_is_share, value)):
        return tuple(map(float, value))
    raise ValueError(
        f"expected a list of at most {len(DEPTHS)} numbers in [0, 1] (shares of the budget), got {shown(value)}"
    )


def _is_share(x: object) -> bool:
    return isinstance(x, float | int) and not isinstance(x, bool) and 0 <= x <= 1


@frozen_pass
class DAPE:
    """Cover each image by regions of 1, 4 or 16 tokens; look closer at some of them at three depths.

    Args:
        budget: regions: int tokens per image, or float fraction of each image's tokens; at least one for each block of
            4 x 4 tokens. 1.0 is the original. A frame of a video counts as an image.
        detail: shares of the budget, one for each of the layers at 1/8, 1/4 and 1/2 of the depth (layer 1 at the
            earliest): how many tokens are added there, or how many regions take up detail.
        mode: ``"split"``: regions are split, new tokens enter as they left the projector, averaged over their part;
            ``"inject"``: a trained block adds detail to the regions' tokens; as it starts, it adds nothing.
        matching: ``"free"``: by cosine; ``"learned"``: by a trained block.
    """

    name: ClassVar[str] = "dape"
    tunes: ClassVar[tuple[str, ...]] = ("start",)

    budget: Budget = 0.5
    detail: Annotated[Sequence[float], PlainValidator(_shares)] = (0.25, 0.15, 0.10)
    mode: Literal["split", "inject"] = "split"
    matching: Literal["free", "learned"] = "free"

    @classmethod
    def tuned(cls, amount: float, draw: Draw) -> DAPE:
        """With and without splits; no fewer regions than there can be."""
        return cls(budget=max(amount, 0.0625), detail=draw.pick("detail", ((), (0.25, 0.15, 0.10))))

    def refuse(self, plan: Plan) -> str | None:
        """The grid is not known, or an earlier pass drops vision tokens or takes them out of the stream."""
        if "grid" not in plan.features:
            return plan.refusals.get("grid", "how an image's tokens lie on a grid is not known in this model")
        if gone := plan.exhausted():
            return gone
        stages = self._stages(plan)
        for layer in (0, *(layer for layer, _ in stages)):
            left = reduce(operator.or_, (x.vision_part() for entry in plan.layers[layer:] for x in entry.sets()))
            if left != Vision:
                return f"an earlier pass leaves {plan.render(left)} from layer {layer} on; expected whole images"
        if stages and plan.branches:
            first = plan.branches[0]
            return f"an earlier pass takes {plan.render(first.tokens)} out of layers {first.leave}-{first.rejoin - 1}"
        return None

    @property
    def trained_by(self) -> tuple[str, ...]:
        """A learned matching by terms of its own beside the model's loss."""
        return ("terms",) if self.matching == "learned" else ()

    def terms(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """Alignment and number of regions, weighted; see :func:`vlmrewrite.passes.dape.losses.dape_terms`."""
        from vlmrewrite.passes.dape.losses import ALIGNMENT, COUNTS, dape_terms  # which imports this module

        alignment, counts = dape_terms(model, inputs)
        return {"alignment": ALIGNMENT * alignment, "counts": COUNTS * counts}

    def _stages(self, plan: Plan) -> list[tuple[int, float]]:
        """Layer and share of the stages; those that fall on one layer are one stage."""
        found: dict[int, float] = {}
        for at, share in zip(DEPTHS, self.detail, strict=False):
            layer = max(1, layer_index(at, plan.depth))
            if layer < plan.depth and share > 0:
                found[layer] = found.get(layer, 0.0) + share
        return list(found.items())

    def change(self, plan: Plan) -> None:
        """One selection and one edit before the decoder; a selection and an edit, or an edit alone, at each stage."""
        op, needs = ops.COVER, ("features", "stream", "prompt", "flat", "grid")
        if isinstance(self.budget, float) and self.budget == 1.0:
            plan.narrow(Policy("cover", op, needs), self.budget)
            return
        block = plan.block(Weights(Matching), "matching") if self.matching == "learned" else ""
        weights = tuple(f"{block}.{name}" for name in Matching.NAMES) if block else ()
        cover = plan.narrow(Policy("cover", op, needs, weights=weights), self.budget, per="frame")
        plan.edit(Edit("pool", cover, POOL, 0, (*POOL_NEEDS, "prompt") if weights else POOL_NEEDS, weights))
        tokens: TokenSet = cover
        for layer, share in self._stages(plan):
            if self.mode == "inject":
                self._inject(plan, cover, layer, share)
            else:
                tokens = self._split(plan, tokens, layer, share)

    def _inject(self, plan: Plan, cover: TokenSet, layer: int, share: float) -> None:
        block = plan.block(Weights(Detail), f"layer_{layer}")
        needs = ("attention", "features", "prompt", "flat", "lengths", "grid")
        weights = tuple(f"{block}.{name}" for name in Detail.NAMES)
        plan.edit(Edit("detail", cover, ops.INJECT, layer, needs, weights, (share,)))

    def _split(self, plan: Plan, tokens: TokenSet, layer: int, share: float) -> TokenSet:
        """Add tokens from a layer on; returns all of them."""
        more = min(1.0, share * self.budget) if isinstance(self.budget, float) else round(share * self.budget)
        if not more:
            return tokens
        policy = Policy("split", ops.SPLIT, ("attention_outside", "features", "grid"))
        added = (Vision - tokens).select(policy, more, at=layer, per="frame")
        plan.edit(Edit("pool", added, POOL, layer, POOL_NEEDS))
        return plan.widen(tokens, added, layer)
