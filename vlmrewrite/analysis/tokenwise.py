"""Which operations treat every token alike, so that they can run on a subset of the tokens.

The token axis of a tensor is the dimension whose size contains the length symbol: T, or c·T where leading dimensions
are merged into it, as by ``view(-1, H)``. Rows keep different tokens, so that mixing rows mixes tokens, too. What is
not in a table here is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from vlmrewrite.analysis import operators
from vlmrewrite.analysis.functions import TRIED
from vlmrewrite.analysis.graph import expression, is_number, symbols, value
from vlmrewrite.analysis.operators import called, hidden_write, name_of, set_item
from vlmrewrite.compat import tree_leaves

VERDICT = "not token-wise"
"""Where a captured node keeps what :func:`mixes` has said, in a list that its copies in other layers share."""


def mixes(node: Node, length: object, batch: object) -> str | None:
    """What :func:`not_token_wise` says of a captured node, which does not change: looked for once."""
    known: list[str | None] = node.meta.setdefault(VERDICT, [])
    if not known:
        known.append(not_token_wise(node, length, batch))
    return known[0]


def not_token_wise(node: Node, length: object, batch: object = None) -> str | None:
    """Why the node may mix tokens, or None if each token's output depends on that token of that row alone.

    Args:
        node: a captured node inside a decoder layer.
        length: symbolic size of the token axis.
        batch: size of the batch axis; without it, only what the axes of the node tell of the rows is checked.
    """
    if node.op not in ("call_function", "call_method"):
        return f"a {node.op} node is not recognised"
    target = called(node)
    rule = rule_of(target) or (_aligned if TRIED in node.meta else None)
    reason = hidden_write(node) or node.meta.get(TRIED)
    if reason is not None or rule is None:
        return reason or f"{name_of(target)!r} is not known to treat tokens alike"
    inputs, out = _tensors(node.all_input_nodes), _tensors(node)
    tokens = any("token" in _axes(x, length).values() for x in inputs)
    if target in operators.SIZES or (is_number(node) and not tokens):
        return None
    reason = _broken(inputs, length, batch) or rule(node, length) or _broken(out, length, batch)
    if reason is not None:
        return reason
    if target not in operators.SIZED and any(symbols(n) & symbols(length) for n in node.all_input_nodes):
        return "it computes with the number of tokens"
    if not out:
        return "the shape of its result is not known"
    lost = tokens and any("token" not in _axes(x, length).values() for x in out)
    return "its result has no token axis" if lost and target not in operators.CONSTANTS else None


def rule_of(target: Any) -> Callable[[Node, object], str | None] | None:
    """What says of a node with this target why it may mix tokens; None if nothing is known of the target."""
    return next((rule for kind, rule in _RULES if target in kind), None)


def _tensors(nodes: object) -> list[Tensor]:
    """The tensors that a node, or each of several, stands for; anything else stands for none."""
    values = [value(n) for n in tree_leaves(nodes) if isinstance(n, Node)]
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


def _axes(x: Tensor, length: object) -> dict[int, str]:
    """Which dimensions, counted from the right, are "token" and "batch" axes: of any other symbolic size."""
    axes = {d - x.dim(): symbols(n) for d, n in enumerate(x.shape)}
    return {d: "token" if found & symbols(length) else "batch" for d, found in axes.items() if found}


def _places(nodes: object, length: object) -> list[tuple[Tensor, int, str]]:
    """Each tensor of some nodes with each of its axes."""
    return [(x, d, kind) for x in _tensors(nodes) for d, kind in _axes(x, length).items()]


def _broken(tensors: list[Tensor], length: object, batch: object) -> str | None:
    """Why the tensors do not all hold whole tokens along one axis, and rows, or copies of them all, along one more."""
    for x in tensors:
        axes = _axes(x, length)
        twice = next((kind for kind in axes.values() if [*axes.values()].count(kind) > 1), None)
        if twice is not None:
            return f"two {twice} axes meet, shape {tuple(x.shape)}"
        times = [expression(x.shape[d]) / expression(length) for d, kind in axes.items() if kind == "token"]
        if any(symbols(t) & symbols(length) or not t.is_integer for t in times):
            return f"it takes tokens apart or leaves some out, shape {tuple(x.shape)}"
        rows = [expression(x.shape[d]) for d, kind in axes.items() if kind == "batch"] or times
        copies = [r / expression(batch) for r in rows if batch is not None and symbols(r)]
        if any(symbols(c) or not c.is_integer for c in copies):
            return f"it takes rows apart or leaves some out, shape {tuple(x.shape)}"
    return None


def _aligned(node: Node, length: object, only: slice = slice(None)) -> str | None:
    """The axes of inputs and results must have the same places, counted from the right, and sizes."""
    for x, d, kind in _places(node.all_input_nodes[only], length):
        if any(d < -y.dim() or expression(x.shape[d]) != expression(y.shape[d]) for y in _tensors(node)):
            return f"the {kind} axes of its inputs and its result are not the same"
    return None


def _expanded(node: Node, length: object) -> str | None:
    """The axes keep their places; all rows may be copied, one copy behind another."""
    (y,) = _tensors(node)
    for x, d, kind in _places(node.all_input_nodes[:1], length):
        copies = expression(y.shape[d]) / expression(x.shape[d])
        if copies != 1 and (symbols(copies) or not d == -x.dim() == -y.dim()):
            return f"the {kind} axes of its inputs and its result are not the same"
    return None


def _reshaped(node: Node, length: object) -> str | None:
    """Tokens and rows stay whole and in order."""
    for x, y in zip(_tensors(node.all_input_nodes[0]), _tensors(node), strict=False):
        (*before, rows), (*after, now) = _strides(x, length), _strides(y, length)
        if "token" in _axes(y, length).values() and (before != after or symbols(rows / now)):
            return f"it takes tokens apart or reorders them, shape {tuple(x.shape)} to {tuple(y.shape)}"
    return None


def _strides(x: Tensor, length: object) -> tuple[Any, ...]:
    """The number of elements, of each token and of each row; and the number of rows, which c·T holds as well.

    Copies of all rows, one behind another, count as rows.
    """
    after = {kind: expression(math.prod(x.shape[x.dim() + d + 1 :])) for d, kind in _axes(x, length).items()}
    sizes = {kind: expression(x.shape[d]) for d, kind in _axes(x, length).items()}
    if "token" in sizes and "batch" not in sizes and symbols(rows := sizes["token"] / expression(length)):
        sizes["batch"], after["batch"] = rows, after["token"] * expression(length)
    return expression(x.numel()), after, sizes.get("batch", 1)


def _along(node: Node, length: object) -> str | None:
    target = called(node)
    if name_of(target) in ("max", "min") and _tensors(_argument(node, 1, "other")):
        return _aligned(node, length)
    place, default = operators.ALONG[target]
    dim: Any = _argument(node, place, "dim", "axis", "dims", default=default)
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    for x, d, kind in _places(_argument(node, 0, "input", "tensor", "tensors"), length):
        if not dims or any(type(i) is not int for i in dims):
            return "it works on all dimensions at once"
        if any(i % x.dim() == d % x.dim() for i in dims):
            return f"it works along the {kind} axis, which is not known to treat tokens alike"
    if target not in operators.MEETING:
        return None
    apart = len({tuple(_axes(x, length)) for x in _tensors(node.all_input_nodes)}) > 1
    return "the axes of its inputs are not the same" if apart else _aligned(node, length)


def _normed(node: Node, length: object) -> str | None:
    shape = _argument(node, 1, "normalized_shape")
    if not isinstance(shape, (tuple, list)):
        return "its normalized shape is not known"
    over = next((kind for _, d, kind in _places(node.all_input_nodes[0], length) if d >= -len(shape)), None)
    return _aligned(node, length) if over is None else f"it normalises over the {over} axis"


def _multiplied(node: Node, length: object) -> str | None:
    """``linear(x, W)``, x @ W and W @ x, and a product for each token of two matrices of its own."""
    operands = _tensors(_argument(node, 0, "input")) + _tensors(_argument(node, 1, "weight", "other", "mat2"))
    if len(operands) != 2:
        return "its operands are not known"
    left, right = (_axes(x, length) for x in operands)
    tokens = [d for axes in (left, right) for d, kind in axes.items() if kind == "token"]
    if called(node) in operators.LINEAR and right:
        return f"its weight has a {next(iter(right.values()))} axis"
    if len(tokens) > 1 and max(tokens) > -3:
        return "it multiplies two activations"
    if -1 in left or -2 in right:
        return f"it sums over the {left.get(-1) or right.get(-2)} axis"
    return _aligned(node, length) if operands[1].dim() > 1 else None


def _to_experts(node: Node, length: object) -> str | None:
    """Tokens come first, in the inputs and in the result; weights have none."""
    x, experts, *weights = map(_tensors, node.all_input_nodes)
    if any(_axes(w, length) for each in weights for w in each):
        return "its weight has a token axis"
    apart = any(_axes(y, length) != {-y.dim(): "token"} for y in (*x, *experts, *_tensors(node)))
    return "the axes of its inputs are not the same" if apart else None


def _indexed(node: Node, length: object) -> str | None:
    x, index = value(node.all_input_nodes[0]), node.args[1]
    if not isinstance(x, Tensor):
        return None  # one of several results
    given: list[Any] = [i for i in (index if isinstance(index, tuple) else (index,)) if i is not None]
    if len(given) == 1 and isinstance(value(index) if isinstance(index, Node) else index, Tensor):
        return _looked_up(node, index, x, length)
    if any(_tensors(i) or isinstance(i, (bool, list, tuple, Tensor)) for i in given):
        return "it is indexed by another tensor"
    if Ellipsis in given:
        at = given.index(Ellipsis)
        given[at : at + 1] = [slice(None)] * (x.dim() - len(given) + 1)
    for d, (i, size) in enumerate(zip(given, x.shape, strict=False)):
        start, stop, step = (i.start, i.stop, i.step) if isinstance(i, slice) else (i, i, i)
        whole = start in (None, 0) and step in (None, 1) and (stop is None or expression(stop) == expression(size))
        if symbols(size) and not whole:
            return f"it takes a part of the {_axes(x, length)[d - x.dim()]} axis"
        if not symbols(size) and any(symbols(n) & symbols(length) for n in (start, stop, step)):
            return "it computes with the number of tokens"
    return None


def _looked_up(node: Node, index: Any, table: Tensor, length: object) -> str | None:
    """Each place of the index is that of what stands there in a table of numbers, which has no tokens."""
    if _axes(table, length) or value(index).dtype.is_floating_point or value(index).dtype == torch.bool:
        return "it is indexed by another tensor"
    (out,) = _tensors(node)
    places = {d - table.dim() + 1: kind for d, kind in _axes(value(index), length).items()}
    return None if _axes(out, length) == places else "the axes of its index and its result are not the same"


def _set(node: Node, length: object) -> str | None:
    """Whole tokens are written to."""
    return _indexed(node, length) or _aligned(node, length)


def _argument(node: Node, place: int, *names: str, default: object = None) -> object:
    given = [*node.args[place : place + 1], *(node.kwargs[n] for n in names if n in node.kwargs)]
    return given[0] if given else default


_RULES: list[tuple[Any, Callable[[Node, object], str | None]]] = [
    (operators.POINTWISE, _aligned),
    (operators.EXPANSIONS, _expanded),
    (operators.CASTS, lambda node, length: _aligned(node, length, slice(1))),
    (operators.RESHAPES, _reshaped),
    (
        operators.LAYOUTS | operators.CONSTANTS | operators.SIZES | operators.STACK | operators.OF_TOKENS,
        lambda node, length: None,
    ),
    (operators.ALONG, _along),
    (operators.NORMS, _normed),
    (operators.LINEAR | operators.MATMULS, _multiplied),
    (operators.EXPERTS, _to_experts),
    (operators.ITEMS, _indexed),
    ({set_item}, _set),
]
