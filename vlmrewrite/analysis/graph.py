"""Queries on a captured graph: example values, token axis, reachability, and where a node comes from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import networkx as nx
import torch
from torch import Tensor
from torch.fx import Node


def value(node: Node) -> Any:
    """The node's example value: a fake tensor, a SymInt, or whatever Dynamo recorded."""
    return node.meta.get("example_value")


def axis(node: Node, length: object) -> int | None:
    """The dimension of a tensor node that is the token axis, or None.

    Raises:
        ValueError: more than one dimension has the size of the token axis.
    """
    x = value(node)
    dims = [d for d, n in enumerate(x.shape) if same(n, length)] if isinstance(x, Tensor) else []
    if len(dims) > 1:
        raise ValueError(f"{where(node)} has two token axes, shape {tuple(x.shape)}; expected one")
    return dims[0] if dims else None


def expression(number: Any) -> Any:
    """A number of a shape, or of a node, as an expression: comparing two adds no guard."""
    number = value(number) if isinstance(number, Node) else number
    return number.node.expr if hasattr(number, "node") else number


def symbols(number: object) -> Any:
    """Those in a number of a shape, or in a node that is one."""
    return getattr(expression(number), "free_symbols", frozenset())


def sizes(node: Node) -> list[Any]:
    """A tensor's shape, or a number, as expressions."""
    x = value(node)
    return [expression(n) for n in (x.shape if isinstance(x, Tensor) else [x])]


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same expression (or, if both are ints, equal), without adding a guard."""
    return bool(expression(a) == expression(b))


def where(node: Node) -> str:
    """The node with the source line it was captured from, or the policy or edit it is, for error messages."""
    lines = [x.strip() for x in (node.meta.get("stack_trace") or "").splitlines() if x.strip(" ^~")]
    return f"node {node.name} ({node.meta.get('asked_by') or ' / '.join(lines[-2:]) or 'no source line'})"


def closure(start: Iterable[Node], near: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """``start`` and every node that is reached from it by steps from a node to one of those near it."""
    seen = set(start)
    queue = list(seen)
    while queue:
        new = set(near(queue.pop())) - seen
        seen |= new
        queue += new
    return seen


def reachable(start: Iterable[Node]) -> set[Node]:
    """``start`` and every node that depends on it."""
    return closure(start, lambda n: n.users)


def needed(end: Iterable[Node], stop: Collection[Node] = ()) -> set[Node]:
    """``end`` and every node it depends on, not going beyond ``stop``."""
    return closure(end, lambda n: () if n in stop else n.all_input_nodes)


def is_number(node: Node) -> bool:
    """Whether a node holds a number, symbolic or not."""
    return isinstance(value(node), (int, float, torch.SymBool, torch.SymInt, torch.SymFloat, torch.Size))


def dominators(start: Node, after: set[Node]) -> nx.DiGraph[Node]:
    """A tree of the nodes that depend on ``start``: every path from it to a node goes through those above the node.

    Sizes are no path: they tell nothing of the values.
    """
    graph = nx.DiGraph((a, b) for b in after for a in b.all_input_nodes if a in after and not is_number(a))
    return nx.DiGraph((above, n) for n, above in nx.immediate_dominators(graph, start).items() if n is not start)
