"""The last call of a rewritten model as masks for the oracle, and the comparison with it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vlmrewrite.oracle.hooks import oracle_logits
from vlmrewrite.oracle.masks import BranchMask, EditMask, LayerMasks
from vlmrewrite.plan import Branch, Edit, TokenSet
from vlmrewrite.runtime import last_call, session_of


def layer_masks(model: nn.Module, total: int | None = None) -> list[LayerMasks]:
    """What each layer did in the last call with an image, for the oracle; tokens that came later belong to every set.

    Args:
        total: length of the logical sequence; default: that of the call.

    Raises:
        ValueError: no recipe is applied, or there was no such call yet.
    """
    program, call, chosen = last_call(model)
    more = (total or call.length) - call.length

    def mask(s: TokenSet, later: bool = True) -> Tensor:
        return torch.nn.functional.pad(call.members(s, chosen), (0, more), value=later)

    def branch(b: Branch) -> BranchMask:
        block = None if b.block is None else copy.deepcopy(program.blocks[b.block])
        return BranchMask(mask(b.tokens, later=False), b.rejoin, block)

    def edit(e: Edit) -> EditMask:
        weights = tuple(program.blocks.get_parameter(name).detach().clone() for name in e.weights)
        return EditMask(e, call.members(e.tokens, chosen), call, weights)

    return [
        LayerMasks(
            run=mask(e.run_set),
            keys=mask(e.keys),
            mlp=None if e.mlp_set is None else mask(e.mlp_set),
            edits=tuple(edit(x) for x in program.plan.edits if x.at == e.index),
            branches=tuple(branch(b) for b in program.plan.branches if b.leave == e.index),
        )
        for e in program.plan.layers
    ]


@torch.no_grad()
def verify_applied(model: nn.Module, inputs: dict[str, Any]) -> float:
    """The largest difference of a logit between a rewritten model and the oracle; see :func:`vlmrewrite.verify`.

    Meanwhile there are hooks on the model's modules: no other thread may use it.
    """
    session = session_of(model)
    before = session.latest
    got = model(**inputs).logits
    if session.latest is before:
        raise ValueError("no call with an image was made: the inputs hold none, and there is nothing to judge")
    masks = layer_masks(model)
    rewritten = model.__dict__.pop("forward")  # and what is left is its class's own
    try:
        expected = oracle_logits(model, inputs, masks)[:, -got.shape[1] :]
    finally:
        model.__dict__["forward"] = rewritten
    padding = inputs.get("attention_mask")
    error = (got - expected).abs().amax(-1)
    if isinstance(padding, Tensor) and padding.dim() == 2:
        error = error.masked_fill(~padding[:, -got.shape[1] :].bool(), 0.0)
    return float(error.max())
