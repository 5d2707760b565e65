"""Which nodes write into their arguments, and which tensors share memory with one another."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx import Node

from vlmrewrite.analysis.graph import closure, needed, reachable, value
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
    name = name_of(target)
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


def name_of(target: object) -> str:
    """The name of what is called, for a method as for a function."""
    return str(getattr(target, "__name__", target))


def is_number(node: Node) -> bool:
    """Whether a node holds a number, symbolic or not."""
    return isinstance(value(node), NUMBERS)
