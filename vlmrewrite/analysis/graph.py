"""Queries on a captured graph: example values, token axis, reachability, and where a node comes from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node


def value(node: Node) -> object:
    """The node's example value: a fake tensor, a SymInt, or whatever Dynamo recorded."""
    return node.meta.get("example_value")


def axis(node: Node, length: object) -> int | None:
    """The dimension of a tensor node that is the token axis, or None.

    Raises:
        ValueError: more than one dimension has the size of the token axis.
    """
    x = value(node)
    if not isinstance(x, Tensor):
        return None
    dims = [d for d, n in enumerate(x.shape) if same(n, length)]
    if len(dims) > 1:
        raise ValueError(f"{where(node)} has two token axes, shape {tuple(x.shape)}; expected one")
    return dims[0] if dims else None


def same(a: Any, b: Any) -> bool:
    """Whether two sizes are the same symbol (or, if both are ints, equal), without adding a guard."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return type(a) is type(b) and a == b


def where(node: Node) -> str:
    """The node with the source line it was captured from, for error messages."""
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.strip().splitlines()]
    at = " / ".join(lines[-2:]) if lines else "no source line"
    return f"node {node.name} ({at})"


def reachable(start: Iterable[Node]) -> set[Node]:
    """``start`` and every node that depends on it."""
    seen = set(start)
    queue = list(seen)
    while queue:
        for user in queue.pop().users:
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return seen


def needed(end: Iterable[Node], stop: set[Node] | frozenset[Node] = frozenset()) -> set[Node]:
    """``end`` and every node it depends on, not going beyond ``stop``."""
    seen = set(end)
    queue = [n for n in seen if n not in stop]
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                if source not in stop:
                    queue.append(source)
    return seen
