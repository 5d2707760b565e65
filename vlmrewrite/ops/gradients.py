"""Gradients of operators that hold a module's own code: it runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vlmrewrite.compat import tree_leaves
from vlmrewrite.ops.library import define
from vlmrewrite.ops.recomputing import given_back, recomputed, remember


def differentiate(name: str, arguments: str, reference: Callable[..., Any]) -> None:
    """Give ``vlm::name`` a gradient; where a compiler traces it, ``vlm::name_backward``, so that it does not look in.

    Args:
        name: of an operator that is opaque to tracing.
        arguments: as they stand in its schema.
        reference: what it computes.
    """

    def computed(gradients: list[Tensor | None], *given: Any) -> list[Tensor]:
        *inputs, wanted = given
        found = recomputed(reference, gradients, inputs, wanted)
        return [torch.zeros_like(x) if g is None else g.contiguous() for x, g in found]

    def fake(gradients: list[Tensor | None], *given: Any) -> list[Tensor]:
        *inputs, wanted = given
        tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        return [x.new_empty(x.shape) for x, asked in zip(tensors, wanted, strict=True) if asked]

    def compute(gradients: Any, inputs: Any, wanted: Any) -> list[Tensor | None]:
        tensors = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]
        if any(type(x) not in (Tensor, nn.Parameter) for x in tensors):
            return operator(gradients, *inputs, wanted)  # type: ignore[no-any-return]
        return [g for _, g in recomputed(reference, gradients, inputs, wanted)]

    define(f"{name}_backward(Tensor?[] gradients, {arguments}, bool[] wanted) -> Tensor[]", computed, fake)
    operator = getattr(torch.ops.vlm, f"{name}_backward").default

    def through(ctx: Any, *gradients: Any) -> Any:
        return given_back(ctx, gradients, compute)

    torch.library.register_autograd(f"vlm::{name}", through, setup_context=remember)
