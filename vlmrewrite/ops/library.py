"""Operators: each is defined once by its PyTorch reference; some have a Triton kernel besides.

``vlm::name`` is the operator that passes and rewritten graphs speak of; it always computes its reference. Where a
kernel was given, ``vlm_triton::name`` has the same schema and runs the kernel on the devices that can; which of the two
a node becomes is decided once, in lowering.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlmrewrite.compat import tree_flatten, tree_leaves, tree_unflatten
from vlmrewrite.ops.device import kernels_missing, launcher

REFERENCES: dict[object, Callable[..., Any]] = {}
"""Operator -> the Python function that defines it."""

OPAQUE: set[object] = set()
"""The operators that tracing does not see through."""

KERNELS: dict[object, Any] = {}
"""Operator -> the operator of the same schema that runs a Triton kernel."""

_library = torch.library.Library("vlm", "DEF")

_triton = torch.library.Library("vlm_triton", "DEF")


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    *,
    kernel: str | None = None,
    kernel_fake: Callable[..., Any] | None = None,
    backward: bool = False,
    flops: Callable[..., int] | None = None,
    flops_by_value: bool = False,
) -> None:
    """Register ``vlm::<schema>`` with its reference, and ``vlm_triton::<schema>`` if it has a kernel.

    With a ``fake`` the operator is opaque to tracing; without one, tracing sees through it to the reference.

    Args:
        schema: as for ``torch.library.define``, without a namespace.
        reference: what the operator means.
        fake: shapes, dtypes and strides of its outputs.
        kernel: ``"package.module:launcher"``, imported when it first runs; it takes what the operator takes.
        kernel_fake: the outputs of the launcher; by default ``fake``, or without one the reference on fake tensors.
        backward: the kernel's operator can be differentiated; its gradient is the reference's, computed again.
        flops: its FLOPs, see ``torch.utils.flop_counter.register_flop_formula``.
        flops_by_value: ``flops`` takes the tensors themselves, not their shapes.
    """
    name = schema.split("(", 1)[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, reference, "CompositeImplicitAutograd" if fake is None else "CompositeExplicitAutograd")
    packet = getattr(torch.ops.vlm, name)
    if fake is not None:
        torch.library.register_fake(f"vlm::{name}", fake, lib=_library)
        OPAQUE.add(packet.default)
    REFERENCES[packet.default] = reference
    packets = [packet]
    if kernel is not None:
        packets.append(_define_kernel(schema, reference, kernel, kernel_fake or fake or reference, backward))
        KERNELS[packet.default] = packets[1].default
    if flops is not None:
        register_flop_formula(packets, get_raw=flops_by_value)(flops)


def _define_kernel(
    schema: str, reference: Callable[..., Any], kernel: str, fake: Callable[..., Any], backward: bool
) -> Any:
    name = schema.split("(", 1)[0]

    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(x.device for x in args if isinstance(x, Tensor))
        if (reason := kernels_missing(device)) is not None:
            raise RuntimeError(f"vlm_triton::{name} cannot run on {device}: {reason}; expected a graph lowered for it")
        launch = launcher(kernel)
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device(device):  # Triton launches on the current one
            return launch(*args, **kwargs)

    _triton.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _triton.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlm_triton::{name}", fake, lib=_triton)
    if backward:
        torch.library.register_autograd(
            f"vlm_triton::{name}", _through(reference), setup_context=_remember, lib=_triton
        )
    return getattr(torch.ops.vlm_triton, name)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    leaves, ctx.spec = tree_flatten(inputs)
    ctx.holds = [any(isinstance(x, Tensor) for x in tree_leaves(i)) for i in inputs]
    ctx.others = [None if isinstance(x, Tensor) else x for x in leaves]
    ctx.tensors = [i for i, x in enumerate(leaves) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(leaves[i] for i in ctx.tensors))


def _through(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of an operator, from its inputs and its reference."""

    def backward(ctx: Any, *gradients: Any) -> Any:
        leaves: list[Any] = list(ctx.others)
        for i, x in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            leaves[i] = x.detach().requires_grad_(x.requires_grad)
        wanted = [i for i in ctx.tensors if leaves[i].requires_grad]
        with torch.enable_grad():
            made = tree_leaves(reference(*tree_unflatten(leaves, ctx.spec)))
        given = tree_leaves(gradients, is_leaf=lambda x: x is None)
        pairs = [(o, g) for o, g in zip(made, given, strict=True) if g is not None and o.requires_grad]
        outs, grads = [o for o, _ in pairs], [g for _, g in pairs]
        found = torch.autograd.grad(outs, [leaves[i] for i in wanted], grads, allow_unused=True)
        result: list[Any] = [None] * len(leaves)
        for i, g in zip(wanted, found, strict=True):
            result[i] = g
        for_each = zip(tree_unflatten(result, ctx.spec), ctx.holds, strict=True)
        return tuple(x if holds else None for x, holds in for_each)

    return backward
