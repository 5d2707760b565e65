"""Which operations treat every token alike, so that they can run on a subset of the tokens.

The token axis of a tensor is the dimension whose size contains the length symbol: T, or c·T where leading dimensions
are merged into it, as by ``view(-1, H)``. Rows keep different tokens, so that mixing rows mixes tokens, too. What is
not in a table here is refused.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from vlmrewrite.anatomy import needed, reachable, value

_NUMBERS = (bool, int, float, torch.SymBool, torch.SymInt, torch.SymFloat, torch.Size)


def _named(names: str) -> set[Any]:
    """The tensor methods and functions with these names."""
    modules = (operator, torch, F, torch._C._nn, torch.linalg)
    found: set[Any] = {n for n in names.split() if hasattr(Tensor, n)}
    return found | {getattr(m, n) for m in modules for n in names.split() if hasattr(m, n)}


# An element of the result depends on the elements at its place in the inputs, with broadcasting.
_MAPS = (
    "add sub rsub mul div truediv true_divide floordiv floor_divide mod remainder fmod neg abs sign pow sqrt rsqrt"
    " square reciprocal exp exp2 expm1 log log1p log2 sin cos tan tanh atan atan2 erf sigmoid relu relu6 silu gelu mish"
    " elu selu celu leaky_relu softplus logsigmoid hardtanh hardswish hardsigmoid lt le gt ge eq ne and_ or_ xor invert"
    " logical_and logical_or logical_not bitwise_and bitwise_or bitwise_not minimum maximum clamp clip clamp_min where"
    " clamp_max masked_fill lerp addcmul addcdiv nan_to_num isnan isinf isfinite round floor ceil trunc frac clone item"
    " zeros_like ones_like full_like"
)
_POINTWISE = _named(_MAPS)
# The same of the first input; the result may be that input itself.
_CASTS = _named("to float double half bfloat16 int long bool type type_as contiguous detach dropout")
_EXPANSIONS = _named("expand expand_as broadcast_to repeat tile")
_RESHAPES = _named("view reshape view_as reshape_as flatten unflatten unsqueeze")
_LAYOUTS = _named("transpose permute swapaxes swapdims movedim moveaxis t view_as_real view_as_complex")
_CONSTANTS, _SIZES = _named("new_zeros new_ones"), _named("size dim numel")
_STACK, _LINEAR = _named("stack"), _named("linear")
_NORMS, _MATMULS = _named("layer_norm rms_norm"), _named("matmul bmm mm")
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
_ALONG = {target: (place, default) for place, default, names in _DIMENSIONS for target in _named(names)}
_MEETING = _named("cat gather scatter scatter_add take_along_dim")  # all inputs must have the same axes
# Whose results share no memory with their inputs; the last ones mix tokens.
_PIECES = _named("select narrow squeeze unbind chunk split tensor_split")
_FRESH = _POINTWISE | _CONSTANTS | _STACK | _LINEAR | _NORMS | _MATMULS | (_ALONG.keys() - _PIECES)
_FRESH |= _named("repeat tile masked_scatter embedding scaled_dot_product_attention pad")
# Operations in place, and those that return a new tensor instead; then where others take ``inplace``.
_IN_PLACE: dict[Any, Any] = {f"{n}_": n for n in [*_MAPS.split(), "scatter", "scatter_add"] if hasattr(Tensor, n)}
_IN_PLACE |= {getattr(m, f"{n}_"): getattr(m, n) for m in (torch, F) for n in _MAPS.split() if hasattr(m, f"{n}_")}
_IN_PLACE |= {getattr(operator, f"i{n}"): getattr(operator, n) for n in "add sub mul truediv floordiv mod pow".split()}
_IN_PLACE |= {operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor}
_IN_PLACE |= {"copy_": "clone", "zero_": "clone", "fill_": "clone", operator.setitem: operator.setitem}
_FLAG = {"elu": 2, "celu": 2, "leaky_relu": 2, "dropout": 3, "hardtanh": 3, "threshold": 3}
_FLAG |= dict.fromkeys("relu relu6 silu mish selu hardswish hardsigmoid".split(), 1)


def writes(node: Node) -> bool:
    """Whether dead-code elimination must keep the node: inputs, outputs, and writes to tensors that are read later."""
    return node.op in ("placeholder", "output") or _seen(node, lambda reader: reader < node)


def hidden_write(node: Node) -> str | None:
    """Why a copy of the node, even for all tokens, may miss a write in place or make one that others see.

    Only the places of nodes in the graph order such writes and the reads of the same memory, and a copy leaves them.
    """
    if _written(node) and (_target(node) is operator.setitem or _seen(node, needed([node]).__contains__)):
        return "it writes in place over a value that is read elsewhere"
    family = {m for x in node.all_input_nodes for m in _family(x)}
    others = {w for m in family for w in m.users if w is not node and m in _written(w)}
    if others and others - needed([node]) - reachable([node]):
        return "it reads a value that is written in place elsewhere"
    return None


def refuse(node: Node, length: object) -> str | None:
    """Why the node may mix tokens, or None if each token's output depends on that token of that row alone.

    Args:
        node: a captured node inside a decoder layer.
        length: symbolic size of the token axis.
    """
    if node.op not in ("call_function", "call_method"):
        return f"a {node.op} node is not recognised"
    target = _meaning(node)
    rule = next((rule for kind, rule in _RULES if target in kind), None)
    reason = hidden_write(node)
    if reason is not None or rule is None:
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        return reason or f"{name!r} is not known to treat tokens alike"
    inputs, out = [x for n in node.all_input_nodes for x in _tensors(n)], _tensors(node)
    tokens = any("token" in _axes(x, length).values() for x in inputs)
    if target in _SIZES or (_number(node) and not tokens):
        return None
    reason = _broken(inputs, length) or rule(node, length) or _broken(out, length)
    numbers = [] if target in _SIZED else [_symbols(n) & _symbols(length) for n in node.all_input_nodes]
    if reason is None and any(numbers):
        return "it computes with the number of tokens"
    if reason is None and not out:
        return "the shape of its result is not known"
    if reason is None and tokens and any("token" not in _axes(x, length).values() for x in out):
        return None if target in _CONSTANTS else "its result has no token axis"
    return reason


# ---- memory


def _seen(node: Node, harmless: Callable[[Node], bool]) -> bool:
    """Whether what the node writes is the caller's, or read by a node that is not harmless (its own result apart)."""
    family = {m for x in _written(node) for m in _family(x, node)}
    return any(
        m.op in ("placeholder", "get_attr") or any(r is not node and not harmless(r) for r in m.users) for m in family
    )


def _family(node: Node, without: Node | None = None) -> set[Node]:
    """The nodes that may share memory with a node."""
    seen, queue = {node}, [node]
    while queue:
        at = queue.pop()
        near = {*_shared(at), *(u for u in at.users if at in _shared(u))} - {*seen, without}
        seen |= near
        queue.extend(near)
    return seen


def _shared(node: Node) -> list[Node]:
    """The inputs that a node's result may share memory with."""
    target, written = _target(node), _written(node)
    inputs = [n for n in node.all_input_nodes if not _number(n)]
    if written or _number(node) or target in _FRESH:
        return written
    if isinstance(target, torch._ops.OpOverload):
        return inputs if any(r.alias_info for r in target._schema.returns) else []
    if target is operator.getitem and isinstance(value(inputs[0]), (tuple, list)) and not _shared(inputs[0]):
        return []  # one of several new tensors
    return inputs


def _written(node: Node) -> list[Node]:
    """The tensors that a node writes in place."""
    target = _target(node)
    inputs = [n for n in node.all_input_nodes if not _number(n)]
    if isinstance(target, torch._ops.OpOverload):
        return inputs if target._schema.is_mutable else []
    if node.op not in ("call_function", "call_method"):
        return []
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    flag = node.kwargs.get("inplace") or any(node.args[_FLAG.get(name, len(node.args)) :][:1])
    if target in _IN_PLACE or flag:
        return inputs[:1] if not node.args or node.args[0] in inputs else []
    named = name.endswith("_") and not name.endswith("__") and getattr(target, "__module__", "") != "_operator"
    return inputs if named or node.kwargs.get("out") is not None else []


def _target(node: Node) -> Any:
    """What is called; for ``"__iadd__"`` and its like the operator."""
    name = node.target if isinstance(node.target, str) and node.target.startswith("__") else ""
    return getattr(operator, name.strip("_"), node.target) if name else node.target


def _meaning(node: Node) -> Any:
    """What is called; for an operation in place the one that returns a new tensor."""
    return _IN_PLACE.get(_target(node), _target(node))


def _number(node: Node) -> bool:
    return isinstance(value(node), _NUMBERS)


# ---- axes


def _tensors(node: object) -> list[Tensor]:
    x = value(node) if isinstance(node, Node) else None
    return [t for t in (x if isinstance(x, (tuple, list)) else [x]) if isinstance(t, Tensor)]


def _expression(number: Any) -> Any:
    """A number of a shape, or of a node, as an expression."""
    number = value(number) if isinstance(number, Node) else number
    return number.node.expr if hasattr(number, "node") else number


def _symbols(number: object) -> Any:
    return getattr(_expression(number), "free_symbols", frozenset())


def _axes(x: Tensor, length: object) -> dict[int, str]:
    """Which dimensions, counted from the right, are "token" and "batch" axes: of any other symbolic size."""
    kinds = {d - x.dim(): (_symbols(n), _symbols(n) & _symbols(length)) for d, n in enumerate(x.shape)}
    return {d: "token" if tokens else "batch" for d, (symbols, tokens) in kinds.items() if symbols}


def _broken(tensors: list[Tensor], length: object) -> str | None:
    """Why the tensors do not all hold whole tokens along one axis, and rows along one more."""
    for x in tensors:
        axes = _axes(x, length)
        twice = next((kind for kind in axes.values() if [*axes.values()].count(kind) > 1), None)
        if twice is not None:
            return f"two {twice} axes meet, shape {tuple(x.shape)}"
        times = [_expression(x.shape[d]) / _expression(length) for d, kind in axes.items() if kind == "token"]
        if any(_symbols(t) & _symbols(length) or not t.is_integer for t in times):
            return f"it takes tokens apart or leaves some out, shape {tuple(x.shape)}"
    return None


# ---- the rule of each kind


def _aligned(node: Node, length: object, only: slice = slice(None)) -> str | None:
    """The axes of inputs and results must have the same places, counted from the right, and sizes."""
    for x in (x for n in node.all_input_nodes[only] for x in _tensors(n)):
        for d, kind in _axes(x, length).items():
            for y in _tensors(node):
                if d < -y.dim() or _expression(x.shape[d]) != _expression(y.shape[d]):
                    return f"the {kind} axes of its inputs and its result are not the same"
    return None


def _reshaped(node: Node, length: object) -> str | None:
    """Tokens and rows stay whole and in order."""
    for x, y in zip(_tensors(node.all_input_nodes[0]), _tensors(node), strict=False):
        if "token" in _axes(y, length).values() and _strides(x, length) != _strides(y, length):
            return f"it takes tokens apart or reorders them, shape {tuple(x.shape)} to {tuple(y.shape)}"
    return None


def _strides(x: Tensor, length: object) -> tuple[object, ...]:
    """The number of elements, of each token and of each row; and the number of rows, which c·T holds as well."""
    after = {kind: _expression(math.prod(x.shape[x.dim() + d + 1 :])) for d, kind in _axes(x, length).items()}
    sizes = {kind: _expression(x.shape[d]) for d, kind in _axes(x, length).items()}
    if "token" in sizes and "batch" not in sizes and _symbols(rows := sizes["token"] / _expression(length)):
        sizes["batch"], after["batch"] = rows, after["token"] * _expression(length)
    return _expression(x.numel()), after, sizes.get("batch")


def _along(node: Node, length: object) -> str | None:
    target, other = _meaning(node), _argument(node, 1, "other")
    if getattr(target, "__name__", target) in ("max", "min") and _tensors(other):
        return _aligned(node, length)
    place, default = _ALONG[target]
    given: Any = _argument(node, 0, "input", "tensor", "tensors")
    dim: Any = _argument(node, place, "dim", "axis", "dims", default=default)
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    for x in (x for n in (given if isinstance(given, (tuple, list)) else [given]) for x in _tensors(n)):
        for d, kind in _axes(x, length).items():
            if not dims or any(type(i) is not int for i in dims):
                return "it works on all dimensions at once"
            if any(i % x.dim() == d % x.dim() for i in dims):
                return f"it works along the {kind} axis, which is not known to treat tokens alike"
    if target in _MEETING and len({tuple(_axes(x, length)) for n in node.all_input_nodes for x in _tensors(n)}) > 1:
        return "the axes of its inputs are not the same"
    return _aligned(node, length) if target in _MEETING else None


def _normed(node: Node, length: object) -> str | None:
    shape = _argument(node, 1, "normalized_shape")
    if not isinstance(shape, (tuple, list)):
        return "its normalized shape is not known"
    for x in _tensors(node.all_input_nodes[0]):
        for d, kind in _axes(x, length).items():
            if d >= -len(shape):
                return f"it normalises over the {kind} axis"
    return _aligned(node, length)


def _multiplied(node: Node, length: object) -> str | None:
    """``linear(x, W)``, x @ W and W @ x, and a product for each token of two matrices of its own."""
    operands = _tensors(_argument(node, 0, "input")) + _tensors(_argument(node, 1, "weight", "other", "mat2"))
    if len(operands) != 2:
        return "its operands are not known"
    left, right = (_axes(x, length) for x in operands)
    tokens = [d for axes in (left, right) for d, kind in axes.items() if kind == "token"]
    if _meaning(node) in _LINEAR and right:
        return f"its weight has a {next(iter(right.values()))} axis"
    if len(tokens) > 1 and max(tokens) > -3:
        return "it multiplies two activations"
    if -1 in left or -2 in right:
        return f"it sums over the {left.get(-1) or right.get(-2)} axis"
    return _aligned(node, length) if operands[1].dim() > 1 else None


def _indexed(node: Node, length: object) -> str | None:
    x, index = value(node.all_input_nodes[0]), node.args[1]
    if not isinstance(x, Tensor):
        return None  # one of several results
    index = index if isinstance(index, tuple) else (index,)
    if any(_tensors(i) or isinstance(i, (bool, list, tuple, Tensor)) for i in index):
        return "it is indexed by another tensor"
    dim = 0
    for i in index:
        if i is Ellipsis:
            dim += x.dim() - sum(j is not None and j is not Ellipsis for j in index)
        elif i is not None:
            parts = (i.start, i.stop, i.step) if isinstance(i, slice) else (i, i, i)
            size = x.shape[dim]
            if _symbols(size):
                whole = parts[1] is None or _expression(parts[1]) == _expression(size)
                if not whole or parts[0] not in (None, 0) or parts[2] not in (None, 1):
                    return f"it takes a part of the {_axes(x, length)[dim - x.dim()]} axis"
            elif any(_symbols(n) & _symbols(length) for n in parts):
                return "it computes with the number of tokens"
            dim += 1
    return None


def _argument(node: Node, place: int, *names: str, default: object = None) -> object:
    if len(node.args) > place:
        return node.args[place]
    return next((node.kwargs[n] for n in names if n in node.kwargs), default)


_SIZED = _EXPANSIONS | _RESHAPES | _CONSTANTS | {operator.getitem}  # which may take the number of tokens
_RULES: list[tuple[Any, Callable[[Node, object], str | None]]] = [
    (_POINTWISE | _EXPANSIONS, _aligned),
    (_CASTS, lambda node, length: _aligned(node, length, slice(1))),
    (_RESHAPES, _reshaped),
    (_LAYOUTS | _CONSTANTS | _SIZES | _STACK, lambda node, length: None),
    (_ALONG, _along),
    (_NORMS, _normed),
    (_LINEAR | _MATMULS, _multiplied),
    ({operator.getitem}, _indexed),
]
