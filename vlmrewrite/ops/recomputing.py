"""The gradient of an operator from its inputs and its reference, which runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmrewrite.compat import tree_flatten, tree_leaves, tree_unflatten


def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep an operator's inputs for its backward."""
    leaves, ctx.spec = tree_flatten(list(inputs))
    ctx.places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    ctx.others = [None if isinstance(x, Tensor) else x for x in leaves]
    ctx.wanted = [leaves[i].requires_grad for i in ctx.places]
    ctx.holds = [all(isinstance(x, Tensor) for x in (i if isinstance(i, list) else [i])) for i in inputs]
    ctx.save_for_backward(*(leaves[i] for i in ctx.places))


def recomputed(
    reference: Callable[..., Any], gradients: Sequence[Tensor | None], inputs: Sequence[Any], wanted: Sequence[bool]
) -> list[tuple[Tensor, Tensor | None]]:
    """Each tensor that a gradient is wanted for, with that, or None if nothing that it has a part in has one.

    Args:
        reference: what the operator computes.
        gradients: of each tensor that it returned; None where there is none.
        inputs: what it was given.
        wanted: of each tensor there, in order, whether its gradient is.
    """
    leaves, spec = tree_flatten(list(inputs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    with torch.enable_grad():
        for i, asked in zip(places, wanted, strict=True):
            leaves[i] = leaves[i].detach().requires_grad_(asked)
        made = tree_leaves(reference(*tree_unflatten(leaves, spec)))
    pairs = [(o, g) for o, g in zip(made, gradients, strict=True) if g is not None and o.requires_grad]
    asking = [leaves[i] for i in places if leaves[i].requires_grad]
    if not pairs:
        return [(x, None) for x in asking]
    outs, grads = [o for o, _ in pairs], [g for _, g in pairs]
    return list(zip(asking, torch.autograd.grad(outs, asking, grads, allow_unused=True), strict=True))


def given_back(ctx: Any, gradients: Sequence[Any], compute: Callable[..., Sequence[Tensor | None]]) -> tuple[Any, ...]:
    """What an operator's backward returns.

    Args:
        ctx: of :func:`remember`.
        gradients: of what the operator returned.
        compute: given these, the operator's inputs and which gradients are wanted, returns those, in order.
    """
    leaves, result = list(ctx.others), list[Any]([None] * len(ctx.others))
    saved = ctx.saved_tensors  # once: under checkpointing, it makes them anew
    for i, x in zip(ctx.places, saved, strict=True):
        leaves[i] = x
    given = tree_leaves(list(gradients), is_leaf=lambda x: x is None)
    found = iter(compute(given, tree_unflatten(leaves, ctx.spec), ctx.wanted))
    for i, asked in zip(ctx.places, ctx.wanted, strict=True):
        result[i] = next(found) if asked else None
    for_each = zip(tree_unflatten(result, ctx.spec), ctx.holds, strict=True)
    return tuple(x if holds else None for x, holds in for_each)
