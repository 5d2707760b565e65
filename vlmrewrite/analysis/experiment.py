"""Operators that nobody declared, tried: does what comes out for a token change where other tokens are others?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from vlmrewrite.analysis.functions import TRIED, Function, as_calls
from vlmrewrite.analysis.graph import expression, is_number, sizes, symbols, value
from vlmrewrite.analysis.tokenwise import rule_of
from vlmrewrite.compat import has_gradient, operator_of, schema_of
from vlmrewrite.ops import Differentiable

_OURS = ("prim", "prims", "vlm")
_KEPT, _LOUD = slice(0, None, 2), 1000.0


class _UntriedError(Exception):
    """Why an operator cannot be tried."""


@torch.no_grad()
def try_operators(gm: GraphModule, inputs: Mapping[Node, object]) -> None:
    """Try each operator, and autograd function, of which nothing is known in a captured graph; note what came out.

    Its weights are the model's; its tokens are random. Half of them are left out, which are a thousand times larger
    than the others: what works along tokens, and be it that it scales all of them by the largest, gives the others
    other results by far more than rounding does.

    Args:
        gm: changed in place, where an operator has no gradient: it gets one, if it is linear.
        inputs: what each placeholder was given.
    """
    found: dict[str, tuple[str | None, Any]] = {}
    as_calls(gm)
    for node in gm.graph.nodes:
        operator = operator_of(node.target) if node.op == "call_function" else None
        unknown = operator is not None and operator.namespace not in _OURS and rule_of(node.target) is None
        if isinstance(node.target, Function) or unknown:
            key = repr((node.target, map_arg(node.args, _form), map_arg(node.kwargs, _form)))
            if key not in found:
                known = operator is None or has_gradient(operator)
                found[key] = _trial(node, operator, gm, inputs), None if known else Differentiable(operator)
            node.meta[TRIED], instead = found[key]
            if instead is not None and node.meta[TRIED] is None:
                node.target = instead


def _trial(node: Node, operator: Any, gm: GraphModule, inputs: Mapping[Node, object]) -> str | None:
    made: dict[Node, Any] = {}
    numbers: dict[object, int] = {}
    generator = torch.Generator().manual_seed(0)
    try:
        if operator is not None and schema_of(operator).is_mutable:
            raise _UntriedError("it writes to its arguments")
        for arg in node.all_input_nodes:
            made[arg] = _random(arg, numbers, generator) if _axes(arg) else _constant(arg, gm, inputs)
        out = value(node)
        if not isinstance(out, Tensor):
            raise _UntriedError("its result is not one tensor")
        for axis in {axis for arg in made for axis in _axes(arg).items()}:
            if _axes(node).get(axis[0]) != axis[1]:
                raise _UntriedError("the axes of its inputs and its result are not the same")
            _compare(node, made, axis)
    except Exception as e:
        told = str(e) if isinstance(e, _UntriedError) else f"on made-up tokens it raised {type(e).__name__}: {e}"
        named = " of ".join(map(str, (node.target, *(x for x in node.args if isinstance(x, str)))))
        return f"{named} is not known to treat tokens alike: {told}"
    return None


def _compare(node: Node, made: Mapping[Node, Any], axis: tuple[int, object]) -> None:
    place, those = axis[0], [arg for arg in made if axis in _axes(arg).items()]

    def kept(x: Tensor) -> Tensor:
        return x.movedim(place, 0)[_KEPT].movedim(0, place)

    few, loud = dict(made), dict(made)
    for arg in those:
        few[arg], loud[arg] = kept(made[arg]).contiguous(), made[arg] * _LOUD
        loud[arg].movedim(place, 0)[_KEPT] = made[arg].movedim(place, 0)[_KEPT]
    alone, among = _run(node, few.__getitem__).double(), kept(_run(node, loud.__getitem__).double())
    if alone.shape != among.shape or not (alone - among).abs().max() <= 0.05 * alone.abs().max():
        raise _UntriedError("tokens that were left out changed what came out for others")


def _run(node: Node, known: Callable[[Node], Any]) -> Any:
    args: Any = map_arg(node.args, known)
    kwargs: Any = map_arg(node.kwargs, known)
    target: Any = node.target
    return getattr(args[0], target)(*args[1:], **kwargs) if node.op == "call_method" else target(*args, **kwargs)


def _axes(node: Node) -> dict[int, object]:
    """Dimensions of a tensor that are of no fixed size, counted from the right, and their sizes."""
    shape = sizes(node) if isinstance(value(node), Tensor) else []
    return {d - len(shape): n for d, n in enumerate(shape) if symbols(n)}


def _random(node: Node, numbers: dict[object, int], generator: torch.Generator) -> Tensor:
    x = value(node)
    if not x.dtype.is_floating_point:
        raise _UntriedError("it takes whole numbers")
    for s in sorted({s for n in x.shape for s in symbols(n)} - numbers.keys(), key=str):
        numbers[s] = 6 + len(numbers)
    shape = [int(n.subs(numbers)) if symbols(n) else n for n in sizes(node)]
    return torch.randn(shape, generator=generator).to(x.device, x.dtype)


def _constant(node: Node, gm: GraphModule, inputs: Mapping[Node, object]) -> Any:
    """What a node holds that depends on nothing but weights."""
    if symbols(node) or _axes(node):
        raise _UntriedError("it computes with the number of tokens")
    if node in inputs:
        return inputs[node]
    if node.op == "get_attr":
        return attrgetter(str(node.target))(gm)
    return _run(node, lambda n: _constant(n, gm, inputs))


def _form(node: Node) -> Any:
    x = value(node)
    if isinstance(x, Tensor):
        return x.dtype, sizes(node)
    return expression(x) if is_number(node) else x
