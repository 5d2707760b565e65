"""Gradients of operators that hold a module's own code: it runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlmrewrite.compat import tree_flatten, tree_leaves, tree_unflatten
from vlmrewrite.ops.library import define


def differentiate(name: str, arguments: str, reference: Callable[..., Any]) -> None:
    """Give ``vlm::name`` a gradient; where a compiler traces it, ``vlm::name_backward``, so that it does not look in.

    Args:
        name: of an operator that is opaque to tracing.
        arguments: as they stand in its schema.
        reference: what it computes.
    """

    def found(gradients: list[Tensor | None], *given: Any) -> list[tuple[Tensor, Tensor | None]]:
        """Each tensor that a gradient is wanted for, with that, or None if nothing that it has a part in has one."""
        *inputs, wanted = given
        leaves, spec = tree_flatten(inputs)
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

    def backward(*given: Any) -> list[Tensor]:
        return [torch.zeros_like(x) if g is None else g.contiguous() for x, g in found(*given)]

    def fake(gradients: list[Tensor | None], *given: Any) -> list[Tensor]:
        *inputs, wanted = given
        tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        return [x.new_empty(x.shape) for x, asked in zip(tensors, wanted, strict=True) if asked]

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        leaves, ctx.spec = tree_flatten(list(inputs))
        ctx.places = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
        ctx.others = [None if isinstance(x, Tensor) else x for x in leaves]
        ctx.wanted = [leaves[i].requires_grad for i in ctx.places]
        ctx.holds = [all(isinstance(x, Tensor) for x in (i if isinstance(i, list) else [i])) for i in inputs]
        ctx.save_for_backward(*(leaves[i] for i in ctx.places))

    def through(ctx: Any, *gradients: Any) -> Any:
        leaves, result = list(ctx.others), list[Any]([None] * len(ctx.others))
        saved = ctx.saved_tensors  # once: under checkpointing, it makes them anew
        for i, x in zip(ctx.places, saved, strict=True):
            leaves[i] = x
        given = tree_leaves(list(gradients), is_leaf=lambda x: x is None)
        arguments = given, *tree_unflatten(leaves, ctx.spec), ctx.wanted
        traced = any(type(x) not in (Tensor, nn.Parameter) for x in saved)
        each = iter(operator(*arguments) if traced else [g for _, g in found(*arguments)])
        for i, asked in zip(ctx.places, ctx.wanted, strict=True):
            result[i] = next(each) if asked else None
        for_each = zip(tree_unflatten(result, ctx.spec), ctx.holds, strict=True)
        return tuple(x if holds else None for x, holds in for_each)

    define(f"{name}_backward(Tensor?[] gradients, {arguments}, bool[] wanted) -> Tensor[]", backward, fake)
    operator = getattr(torch.ops.vlm, f"{name}_backward").default
    torch.library.register_autograd(f"vlm::{name}", through, setup_context=remember)
