"""FastV, "An Image is Worth 1/2 Tokens After Layer 2" (arXiv 2403.06764), training-free.

The first layers see every vision token; from layer `at` on only those go on that receive most attention there.

    layers 2-31    run_on All  ->  layers 2-31    run_on Text | fastv

Refused where no vision tokens are left. The paper ranks a token by the attention that it receives on average from all
tokens in the layer before the cut; its published inference code takes the last prompt token's attention instead. Here:
the last prompt token's, mean over heads, computed with the norm, q, k and rope of layer `at` itself, so that the layers
before it need not give up fused attention. Kept tokens keep their positions.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from vlmrewrite.draw import Draw
from vlmrewrite.plan import Budget, Depth, Per, Plan, Policy, frozen_pass


@frozen_pass
class FastV:
    """Keep the vision tokens that the last prompt token attends to most, from layer ``at`` on.

    Args:
        keep: int tokens per image, or float fraction of each image's tokens; the paper's R is ``1 - keep``.
        at: layer (int) or fraction of the depth (float), the paper's K.
        per: what the budget is of: each ``"frame"`` (an image is one), each ``"image"`` or whole video, or all of a
            ``"row"`` together.
    """

    name: ClassVar[str] = "fastv"
    tunes: ClassVar[tuple[str, ...]] = ("later",)

    keep: Budget = 0.5
    at: Depth = 2
    per: Per = "image"

    @classmethod
    def tuned(cls, amount: float, draw: Draw) -> FastV:
        """From any layer on."""
        return cls(keep=amount, at=draw.layer("at", 1))

    def refuse(self, plan: Plan) -> str | None:
        """No vision tokens are left from layer ``at`` on."""
        return plan.exhausted(self.at)

    def change(self, plan: Plan) -> None:
        """One selection, by the operator of STS's second stage."""
        ranked = Policy("fastv", torch.ops.vlm.top_attention.default, ("attention",))
        plan.narrow(ranked, self.keep, self.at, self.per)
