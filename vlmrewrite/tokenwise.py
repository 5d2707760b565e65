"""Which operations treat every token alike, so that they can run on a subset of the tokens."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from vlmrewrite.anatomy import same, value

_ELEMENTWISE: set[Any] = {
    *(getattr(operator, n) for n in "add sub mul truediv neg pow lt le gt ge eq ne and_ or_ invert".split()),
    *(getattr(operator, n) for n in "iadd isub imul itruediv".split()),
    *(getattr(torch, n) for n in "add sub mul div neg pow rsqrt sqrt exp tanh sigmoid relu where clamp square".split()),
    *(getattr(torch, n) for n in "ones_like zeros_like abs logical_not".split()),
    *(getattr(F, n) for n in "silu gelu relu tanh sigmoid dropout softplus leaky_relu relu6 mish".split()),
    torch._C._nn.gelu,
    torch.nn.functional.linear,
    torch._C._nn.linear,
}
_ELEMENTWISE |= set("add sub mul div neg pow rsqrt sqrt exp tanh sigmoid relu to float type type_as clamp".split())
_ELEMENTWISE |= set("contiguous square masked_fill item half bfloat16 clone detach".split())
_RESHAPES: set[Any] = {
    "view",
    "reshape",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "expand",
    "flatten",
    "unflatten",
}
_RESHAPES |= {torch.transpose, torch.permute, torch.unsqueeze, torch.squeeze, torch.reshape, torch.flatten}
_ALONG: set[Any] = {"mean", "sum", "softmax", "var", "chunk", "split", "norm", "max", "min", "topk", "argmax"}
_ALONG |= {torch.mean, torch.sum, torch.softmax, F.softmax, torch.chunk, torch.split, torch.cat, torch.stack, F.glu}
_NORMS: set[Any] = {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm}


def writes(node: Node) -> bool:
    """Whether dead-code elimination must keep the node: inputs, outputs and writes to tensors."""
    if node.op in ("placeholder", "output"):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.target is operator.setitem or (name.endswith("_") and not name.endswith("__"))


def refuse(node: Node, length: object) -> str | None:
    """Why the node may mix tokens, or None if each token's output depends on that token alone.

    Args:
        node: a captured node inside a decoder layer.
        length: symbolic size of the token axis.
    """
    target = node.target
    if node.op not in ("call_function", "call_method"):
        return f"a {node.op} node is not recognised"
    if writes(node):
        return "it writes in place"
    if target in _NORMS:
        return None
    if target in _ELEMENTWISE:
        return _in_place_read(node)
    if target in _RESHAPES:
        return None
    if target is operator.getitem:
        return _indexed(node, length)
    if target in (torch.matmul, operator.matmul, "matmul", torch.bmm):
        right = value(node.args[1]) if isinstance(node.args[1], Node) else None
        fine = isinstance(right, Tensor) and right.dim() == 2 and not any(same(n, length) for n in right.shape)
        return None if fine else "it multiplies two activations"
    if target in _ALONG:
        return _along(node, length)
    name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
    return f"{name!r} is not known to treat tokens alike"


def _in_place_read(node: Node) -> str | None:
    if node.target in {operator.iadd, operator.isub, operator.imul, operator.itruediv}:
        first = node.args[0]
        if isinstance(first, Node) and len(first.users) > 1:
            return "it writes in place over a value that is read elsewhere"
    return None


def _token_axes(x: object, length: object) -> set[int]:
    return {d for d, n in enumerate(x.shape) if same(n, length)} if isinstance(x, Tensor) else set()


def _indexed(node: Node, length: object) -> str | None:
    x = value(node.args[0]) if isinstance(node.args[0], Node) else None
    if not isinstance(x, Tensor):
        return None
    index: Any = node.args[1]
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, (Node, list)) for i in index):
        return "it is indexed by another tensor"
    used = sum(i is not None and i is not Ellipsis for i in index)
    dim = 0
    for i in index:
        if i is None:
            continue
        if i is Ellipsis:
            dim += x.dim() - used
            continue
        if dim in _token_axes(x, length) and i != slice(None):
            return "it takes a part of the token axis"
        dim += 1
    return None


def _along(node: Node, length: object) -> str | None:
    first: Any = node.args[0]
    nodes = list(first) if isinstance(first, (list, tuple)) else [first]
    default = 0 if node.target in (torch.cat, torch.stack, torch.chunk, torch.split, "chunk", "split") else None
    at: Any = node.kwargs.get("dim", default)
    if "dim" not in node.kwargs and len(node.args) > 1:
        at = node.args[-1] if node.target in (torch.chunk, torch.split, "chunk", "split") else node.args[1]
    if at is None:
        return "it reduces over all tokens"
    for n in nodes:
        x = value(n) if isinstance(n, Node) else None
        if isinstance(x, Tensor):
            dims = {d % x.dim() for d in (at if isinstance(at, (list, tuple)) else [at])}
            if dims & _token_axes(x, length):
                return "it works along the token axis"
    return None
