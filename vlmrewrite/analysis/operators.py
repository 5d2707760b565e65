"""The operators of captured graphs: in classes, by what they do to the token axis; what they write, what they share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from vlmrewrite.analysis.graph import closure, needed, reachable, value
from vlmrewrite.compat import nn_functions, schema_of


def _named(names: str) -> set[Any]:
    """The tensor methods and functions with these names."""
    modules = (operator, torch, F, nn_functions(), torch.linalg)
    functions: set[Any] = {getattr(m, n) for m in modules for n in names.split() if hasattr(m, n)}
    return functions | {n for n in names.split() if hasattr(Tensor, n)}


# An element of the result depends on the elements at its place in the inputs, with broadcasting.
_MAPS = (
    "add sub rsub mul div truediv true_divide floordiv floor_divide mod remainder fmod neg abs sign pow sqrt rsqrt"
    " square reciprocal exp exp2 expm1 log log1p log2 sin cos tan tanh atan atan2 erf sigmoid relu relu6 silu gelu mish"
    " elu selu celu leaky_relu softplus logsigmoid hardtanh hardswish hardsigmoid lt le gt ge eq ne and_ or_ xor invert"
    " logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not minimum maximum clamp clip clamp_min where"
    " clamp_max masked_fill lerp addcmul addcdiv nan_to_num isnan isinf isfinite round floor ceil trunc frac clone item"
    " zeros_like ones_like full_like"
)

POINTWISE = _named(_MAPS)

# The same of the first input; the result may be that input itself.
CASTS = _named("to float double half bfloat16 int long bool type type_as contiguous detach dropout")

EXPANSIONS = _named("expand expand_as broadcast_to repeat tile")

RESHAPES = _named("view reshape view_as reshape_as flatten unflatten unsqueeze")

LAYOUTS = _named("transpose permute swapaxes swapdims movedim moveaxis t view_as_real view_as_complex")

CONSTANTS, SIZES = _named("new_zeros new_ones"), _named("size dim numel")

STACK, LINEAR = _named("stack"), _named("linear")

NORMS, MATMULS = _named("layer_norm rms_norm"), _named("matmul bmm mm")

# Operations along a dimension: its place among the arguments, its default (None: all dimensions), their names.
_DIMENSIONS: list[tuple[int, int | None, str]] = [
    (1, None, "sum nansum mean nanmean prod amax amin max min argmax argmin all any std var std_mean var_mean"),
    (1, None, "softmax log_softmax softmin logsumexp median nanmedian cumsum cumprod cummax cummin logcumsumexp"),
    (1, None, "select narrow index_select gather scatter scatter_add squeeze"),
    (1, -1, "sort argsort mode glu"),
    (1, 0, "cat unbind"),
    (2, None, "norm vector_norm quantile nanquantile repeat_interleave roll take_along_dim"),
    (2, -1, "topk kthvalue diff"),
    (2, 0, "chunk split tensor_split"),
    (2, 1, "normalize"),
]

ALONG = {target: (place, default) for place, default, names in _DIMENSIONS for target in _named(names)}

MEETING = _named("cat gather scatter scatter_add take_along_dim")  # all inputs must have the same axes

# Whose results share no memory with their inputs; the last ones mix tokens.
_PIECES = _named("select narrow squeeze unbind chunk split tensor_split")

FRESH = POINTWISE | CONSTANTS | STACK | LINEAR | NORMS | MATMULS | (ALONG.keys() - _PIECES)

FRESH |= _named("repeat tile masked_scatter embedding scaled_dot_product_attention pad")

# Operations in place, and those that return a new tensor instead; then where others take ``inplace``.
IN_PLACE: dict[Any, Any] = {f"{n}_": n for n in [*_MAPS.split(), "scatter", "scatter_add"] if hasattr(Tensor, n)}

IN_PLACE |= {getattr(m, f"{n}_"): getattr(m, n) for m in (torch, F) for n in _MAPS.split() if hasattr(m, f"{n}_")}

_AUGMENTED = "add sub mul truediv floordiv mod pow and_ or_ xor".split()

IN_PLACE |= {getattr(operator, f"i{n.strip('_')}"): getattr(operator, n) for n in _AUGMENTED}

IN_PLACE |= {"copy_": "clone", "zero_": "clone", "fill_": "clone", operator.setitem: operator.setitem}

FLAG = {"elu": 2, "celu": 2, "leaky_relu": 2, "dropout": 3, "hardtanh": 3, "threshold": 3}

FLAG |= dict.fromkeys("relu relu6 silu mish selu hardswish hardsigmoid".split(), 1)

ITEMS = {operator.getitem}

SIZED = EXPANSIONS | RESHAPES | CONSTANTS | ITEMS  # which may take the number of tokens


def writes(node: Node) -> bool:
    """Whether dead-code elimination must keep the node: inputs, outputs, and writes to tensors that are read later."""
    return node.op in ("placeholder", "output") or _seen(node, lambda reader: reader < node)


def hidden_write(node: Node) -> str | None:
    """Why a copy of the node, even for all tokens, may miss a write in place or make one that others see.

    Only the places of nodes in the graph order such writes and the reads of the same memory, and a copy leaves them.
    """
    if _written(node) and (_target(node) is operator.setitem or _seen(node, needed([node]).__contains__)):
        return "it writes in place over a value that is read elsewhere"
    others = {w for m in _family(node.all_input_nodes) for w in m.users if w is not node and m in _written(w)}
    if others and others - needed([node]) - reachable([node]):
        return "it reads a value that is written in place elsewhere"
    return None


def _seen(node: Node, harmless: Callable[[Node], bool]) -> bool:
    """Whether what the node writes is the caller's, or read by a node that is not harmless (its own result apart)."""
    family = _family(_written(node), node)
    readers = {r for m in family for r in m.users} - {node}
    return any(m.op in ("placeholder", "get_attr") for m in family) or not all(map(harmless, readers))


def _family(nodes: Iterable[Node], without: Node | None = None) -> set[Node]:
    """The nodes that may share memory with some nodes, not by way of one."""
    return closure(nodes, lambda n: {*_shared(n), *(u for u in n.users if n in _shared(u))} - {without})


def _shared(node: Node) -> list[Node]:
    """The inputs that a node's result may share memory with."""
    target, written = _target(node), _written(node)
    inputs = [n for n in node.all_input_nodes if not is_number(n)]
    if written or is_number(node) or target in FRESH:
        return written
    if (schema := schema_of(target)) is not None:
        return inputs if any(r.alias_info for r in schema.returns) else []
    if target is operator.getitem and isinstance(value(inputs[0]), (tuple, list)) and not _shared(inputs[0]):
        return []  # one of several new tensors
    return inputs


def _written(node: Node) -> list[Node]:
    """The tensors that a node writes in place."""
    target = _target(node)
    inputs = [n for n in node.all_input_nodes if not is_number(n)]
    if (schema := schema_of(target)) is not None:
        return inputs if schema.is_mutable else []
    if node.op not in ("call_function", "call_method"):
        return []
    name = name_of(target)
    flag = node.kwargs.get("inplace") or any(node.args[FLAG.get(name, len(node.args)) :][:1])
    if target in IN_PLACE or flag:
        return inputs[:1] if not node.args or node.args[0] in inputs else []
    named = name.endswith("_") and not name.endswith("__") and getattr(target, "__module__", "") != "_operator"
    return inputs if named or node.kwargs.get("out") is not None else []


def _target(node: Node) -> Any:
    """What is called; for ``"__iadd__"`` and its like the operator."""
    target = node.target
    return getattr(operator, target, target) if isinstance(target, str) and target.startswith("__") else target


def meaning(node: Node) -> Any:
    """What is called; for an operation in place the one that returns a new tensor."""
    return IN_PLACE.get(_target(node), _target(node))


def name_of(target: object) -> str:
    """The name of what is called, for a method as for a function."""
    return str(getattr(target, "__name__", target))


def is_number(node: Node) -> bool:
    """Whether a node holds a number, symbolic or not."""
    return isinstance(value(node), (int, float, torch.SymBool, torch.SymInt, torch.SymFloat, torch.Size))
