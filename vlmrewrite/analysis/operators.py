"""The operators of captured graphs: in classes, by what they do to the token axis; what they write, what they share."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from vlmrewrite.analysis.graph import is_number, value
from vlmrewrite.compat import nn_functions, schema_of
from vlmrewrite.ops import EXPERT_LINEAR, INDEX_KEYS


def _named(names: str) -> set[Any]:
    """The tensor methods and functions with these names."""
    modules = (operator, torch, F, nn_functions(), torch.linalg)
    functions: set[Any] = {getattr(m, n) for m in modules for n in names.split() if hasattr(m, n)}
    return functions | {n for n in names.split() if hasattr(Tensor, n)}


# An element of the result depends on the elements at its place in the inputs, with broadcasting.
_MAPS = (
    "add sub subtract rsub mul multiply div divide truediv true_divide floordiv floor_divide mod remainder fmod neg"
    " abs sign pow sqrt rsqrt square reciprocal exp exp2 expm1 log log1p log2 sin cos tan tanh atan atan2 erf sigmoid"
    " relu relu6 silu gelu mish elu selu celu leaky_relu softplus logsigmoid hardtanh hardswish hardsigmoid lt le gt"
    " ge eq ne and_ or_ xor invert logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not minimum"
    " maximum clamp clip clamp_min where clamp_max masked_fill lerp addcmul addcdiv nan_to_num isnan isinf isfinite"
    " round floor ceil trunc frac clone item zeros_like ones_like full_like empty_like"
)

POINTWISE = _named(_MAPS)

# The same of the first input; the result may be that input itself.
CASTS = _named("to float double half bfloat16 int long bool type type_as contiguous detach dropout")

EXPANSIONS = _named("expand expand_as broadcast_to repeat tile")

RESHAPES = _named("view reshape view_as reshape_as flatten unflatten unsqueeze")

LAYOUTS = _named("transpose permute swapaxes swapdims movedim moveaxis t view_as_real view_as_complex")

CONSTANTS, SIZES = _named("new_zeros new_ones new_full new_empty"), _named("size dim numel")

STACK, LINEAR = _named("stack"), _named("linear")

OF_TOKENS = {INDEX_KEYS}  # inputs and results have rows first, and tokens last but one

EXPERTS = {EXPERT_LINEAR}

NORMS, MATMULS = _named("layer_norm rms_norm"), _named("matmul bmm mm")

# Of the rows of the first input, those that another one names.
PICKS = _named("getitem index_select")


def takes_channels(node: Node) -> bool:
    """Whether one of :data:`PICKS` takes some of the last axis."""
    dim = value(node.all_input_nodes[0]).dim()
    if node.target is not operator.getitem:
        along: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        return bool(along % dim == dim - 1)
    at, index = 0, node.args[1]
    for i in index if isinstance(index, tuple) else (index,):
        named = value(i) if isinstance(i, Node) else None
        axes = named.dim() if isinstance(named, Tensor) and named.dtype == torch.bool else i is not None
        if i is Ellipsis or (isinstance(named, Tensor) and at + axes >= dim):
            return True
        at += axes
    return False


# Operations along a dimension: its place among the arguments, its default (None: all dimensions), their names.
_DIMENSIONS: list[tuple[int, int | None, str]] = [
    (1, None, "sum nansum mean nanmean prod amax amin max min argmax argmin all any std var std_mean var_mean"),
    (1, None, "softmax log_softmax softmin logsumexp median nanmedian cumsum cumprod cummax cummin logcumsumexp"),
    (1, None, "select narrow index_select gather scatter scatter_add squeeze"),
    (1, -1, "sort argsort mode glu"),
    (1, 0, "cat concat concatenate unbind"),
    (2, None, "norm vector_norm quantile nanquantile repeat_interleave roll take_along_dim"),
    (2, -1, "topk kthvalue diff"),
    (2, 0, "chunk split tensor_split"),
    (2, 1, "normalize"),
]

ALONG = {target: (place, default) for place, default, names in _DIMENSIONS for target in _named(names)}

# All inputs must have the same axes.
MEETING = _named("cat concat concatenate gather scatter scatter_add take_along_dim")

_AUGMENTED = {getattr(operator, f"i{n}"): n for n in "add sub mul truediv floordiv mod pow and or xor".split()}

KEEP_DTYPE = set("add sub mul div true_divide truediv masked_fill clamp scatter".split())

# Writes of other names than what returns a new tensor has; what changes the shape of a tensor in place.
NO_TWIN = {f"{n}_" for n in "bernoulli resize squeeze unsqueeze t transpose swapaxes swapdims detach".split()}

# Where operations that take ``inplace`` do so.
FLAG = {"elu": 2, "celu": 2, "leaky_relu": 2, "dropout": 3, "hardtanh": 3, "threshold": 3}

FLAG |= dict.fromkeys("relu relu6 silu mish selu hardswish hardsigmoid".split(), 1)

ITEMS = {operator.getitem}

SIZED = EXPANSIONS | RESHAPES | CONSTANTS | ITEMS  # which may take the number of tokens


def set_item(x: Tensor, index: Any, values: Any) -> Tensor:
    """A copy of a tensor in which ``x[index] = values`` was done."""
    out = x.clone()
    out[index] = values
    return out


def writes(node: Node) -> bool:
    """Whether dead-code elimination must keep the node: inputs, outputs, and writes in place."""
    return node.op in ("placeholder", "output") or bool(written(node))


HIDDEN = "hidden write"
"""Where a node says why a copy of it may miss a write in place, or make one that others see."""


def hidden_write(node: Node) -> str | None:
    """Why a copy of the node, even for all tokens, may miss a write in place or make one that others see."""
    reason: str | None = node.meta.get(HIDDEN)
    return reason or ("it writes in place" if written(node) else None)


def written(node: Node) -> list[Node]:
    """The tensors that a node writes in place."""
    target = called(node)
    inputs = [n for n in node.all_input_nodes if not is_number(n)]
    if (schema := schema_of(target)) is not None:
        return inputs if schema.is_mutable else []
    if node.op not in ("call_function", "call_method"):
        return []
    name = name_of(target)
    named = name.endswith("_") and not name.endswith("__") and getattr(target, "__module__", "") != "_operator"
    if named or target in _AUGMENTED or target is operator.setitem or flag_of(node) is not None:
        return inputs[:1] if not node.args or node.args[0] in inputs else []
    return inputs if node.kwargs.get("out") is not None else []


def flag_of(node: Node) -> int | None:
    """Where a function that is asked to work in place takes that; None if it is not asked."""
    place = FLAG.get(name_of(called(node)), len(node.args))
    return place if node.kwargs.get("inplace") or any(node.args[place:][:1]) else None


def called(node: Node) -> Any:
    """What is called; for ``"__iadd__"`` and its like the operator."""
    target = node.target
    return getattr(operator, target, target) if isinstance(target, str) and target.startswith("__") else target


def name_of(target: object) -> str:
    """The name of what is called, for a method as for a function."""
    return str(getattr(target, "__name__", target))
