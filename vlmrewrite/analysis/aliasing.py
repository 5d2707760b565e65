"""Which nodes write into their arguments, and which tensors share memory with one another."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from vlmrewrite.analysis.graph import needed, reachable, value
from vlmrewrite.analysis.op_classes import FLAG, FRESH, IN_PLACE, NUMBERS


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
    inputs = [n for n in node.all_input_nodes if not is_number(n)]
    if written or is_number(node) or target in FRESH:
        return written
    if isinstance(target, torch._ops.OpOverload):
        return inputs if any(r.alias_info for r in target._schema.returns) else []
    if target is operator.getitem and isinstance(value(inputs[0]), (tuple, list)) and not _shared(inputs[0]):
        return []  # one of several new tensors
    return inputs


def _written(node: Node) -> list[Node]:
    """The tensors that a node writes in place."""
    target = _target(node)
    inputs = [n for n in node.all_input_nodes if not is_number(n)]
    if isinstance(target, torch._ops.OpOverload):
        return inputs if target._schema.is_mutable else []
    if node.op not in ("call_function", "call_method"):
        return []
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    flag = node.kwargs.get("inplace") or any(node.args[FLAG.get(name, len(node.args)) :][:1])
    if target in IN_PLACE or flag:
        return inputs[:1] if not node.args or node.args[0] in inputs else []
    named = name.endswith("_") and not name.endswith("__") and getattr(target, "__module__", "") != "_operator"
    return inputs if named or node.kwargs.get("out") is not None else []


def _target(node: Node) -> Any:
    """What is called; for ``"__iadd__"`` and its like the operator."""
    name = node.target if isinstance(node.target, str) and node.target.startswith("__") else ""
    return getattr(operator, name.strip("_"), node.target) if name else node.target


def meaning(node: Node) -> Any:
    """What is called; for an operation in place the one that returns a new tensor."""
    return IN_PLACE.get(_target(node), _target(node))


def is_number(node: Node) -> bool:
    """Whether a node holds a number, symbolic or not."""
    return isinstance(value(node), NUMBERS)
