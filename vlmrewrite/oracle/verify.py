"""The last call of a rewritten model as masks for the oracle, and the comparison with it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vlmrewrite.oracle.hooks import oracle_logits
from vlmrewrite.oracle.masks import BranchMask, EditMask, LayerMasks
from vlmrewrite.plan import Branch, Edit
from vlmrewrite.runtime import session_of


def layer_masks(model: nn.Module, total: int | None = None) -> list[LayerMasks]:
    """What each layer did in the last call with an image, for the oracle; tokens that came later belong to every set.

    Of a dispatch, each row's are those of the plan that it followed.

    Args:
        total: length of the logical sequence; default: that of the call.

    Raises:
        ValueError: no recipe is applied, or there was no such call yet.
    """
    last = session_of(model).last()
    call, chosen, blocks, plans = last.call, last.result.chosen, last.program.blocks, last.followed
    more = (total or call.length) - call.length

    def later(x: Tensor, value: bool = True) -> Tensor:
        return torch.nn.functional.pad(x, (0, more), value=value)

    def branch(b: Branch, rows: Tensor) -> BranchMask:
        block = None if b.block is None else copy.deepcopy(blocks[b.block])
        return BranchMask(later(call.members(b.tokens, chosen) & rows[:, None], False), b.rejoin, block)

    def edit(e: Edit, rows: Tensor) -> EditMask:
        weights = tuple(blocks.get_parameter(name).detach().clone() for name in e.weights)
        if bool(rows.all()):
            return EditMask(e, call.members(e.tokens, chosen), call, weights)
        at, which = rows.nonzero()[:, 0], rows[call.flat // call.length]
        some, theirs = call.of_rows(at), {s: x[which] for s, x in chosen.items()}
        return EditMask(e, some.members(e.tokens, theirs), some, weights, at)

    def layer(i: int) -> LayerMasks:
        entries = [plan.layers[i] for plan, _ in plans]
        run, keys, mlp = (later(last.members(sets)) for sets in zip(*(e.sets() for e in entries), strict=True))
        some = any(e.mlp_set is not None for e in entries)
        edits = tuple(edit(e, rows) for plan, rows in plans for e in plan.edits if e.at == i)
        branches = tuple(branch(b, rows) for plan, rows in plans for b in plan.branches if b.leave == i)
        return LayerMasks(run, keys, mlp if some else None, None, edits, branches)

    return [layer(i) for i in range(last.result.plan.depth)]


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
