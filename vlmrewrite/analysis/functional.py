"""Writes in place become new tensors, in a captured graph, so that what a node reads is what its inputs say.

Only the order of a graph's nodes tells who reads memory before it is written and who behind, and a rewrite that copies
nodes leaves that order. Which tensors share memory, the example values know.
"""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from vlmrewrite.analysis import operators
from vlmrewrite.analysis.graph import value
from vlmrewrite.analysis.operators import called, flag_of, name_of, set_item, written
from vlmrewrite.compat import memory_of, tree_leaves

_BY_VALUE = {"copy_", "zero_", "fill_"}
_SWAPS = {"transpose", "swapaxes", "swapdims", "t"}
_PARTS = {"chunk": 2, "split": 2, "tensor_split": 2, "unbind": 1}


def functional(graph: Graph) -> None:
    """Put a new tensor in the place of every write in place, and of every view of what was written.

    A write to memory of the caller, or through a view that is not known, stays; it and all that touches the same memory
    are marked, see :func:`vlmrewrite.analysis.operators.hidden_write`.
    """
    if any(map(written, graph.nodes)):
        _Functional(graph).run()


class _Functional:
    """The state of memory while the nodes of a graph are gone through in order.

    Attributes:
        source: for each node that is a view of a tensor, or writes to one, that tensor's.
        now: what stands for a captured node's value, after the writes so far.
        version: how often the memory of a tensor was written to; ``seen``: as of when a node's value in ``now`` is.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph, self.source = graph, dict[Node, Node]()
        memory = {n: {memory_of(x) for x in tree_leaves(value(n)) if isinstance(x, Tensor)} for n in graph.nodes}
        for n in graph.nodes:
            sources = written(n) or [m for m in n.all_input_nodes if memory[m] & memory[n]]
            if sources and (sources[0] in self.source or isinstance(value(sources[0]), Tensor)):  # else of new tensors
                self.source[n] = sources[0]
        self.writing = [n for n in graph.nodes if written(n)]
        left = {self._root(n) for n in self.writing if not self._can_be_new(n)}
        shared = set().union(*(memory[n] for n in left))
        for n in graph.nodes:
            if any(memory[m] & shared for m in (n, *n.all_input_nodes)):
                n.meta[operators.HIDDEN] = "it reads, or writes in place, memory that a write in place changes"
        self.writing = [n for n in self.writing if self._root(n) not in left]
        self.now, self.given = dict[Node, Node](), dict[Node, Node]()
        self.version, self.seen, self.made = Counter[Node](), dict[Node, int](), list[Node]()

    def _root(self, n: Node) -> Node:
        while n in self.source:
            n = self.source[n]
        return n

    def _can_be_new(self, n: Node) -> bool:
        twin, at = _twin(n), self.source[n]
        while twin is not None and at in self.source and (at in self.writing or _known_view(at)):
            at = self.source[at]
        return twin is not None and at not in self.source and at.op not in ("placeholder", "get_attr")

    def run(self) -> None:
        for node in list(self.graph.nodes):
            with self.graph.inserting_before(node):
                if node in self.source:
                    self.given[node] = self._read(self.source[node])
                node.args, node.kwargs = (torch.fx.map_arg(x, self._read) for x in (node.args, node.kwargs))
                self.seen[node] = self.version[self._root(node)]
                if node in self.writing:
                    self._write(node)
        for node in reversed([n for n in self.graph.nodes if n in self.made or n in self.writing]):
            if not node.users:
                self.graph.erase_node(node)

    def _new(self, like: Node, op: str, target: Any, args: Any, kwargs: Any = None) -> Node:
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta = dict(like.meta)
        self.made.append(node)
        return node

    def _read(self, n: Node) -> Node:
        """What holds the node's value now; a view of what was written since is made again."""
        version = self.version[self._root(n)]
        if self.seen[n] != version:
            fresh = self._read(self.source[n])
            if n not in self.writing:
                given = self.given[n]
                args, kwargs = (torch.fx.map_arg(x, lambda a: fresh if a is given else a) for x in (n.args, n.kwargs))
                fresh = self._new(n, n.op, n.target, args, kwargs)
            self.now[n], self.seen[n] = fresh, version
        return self.now.get(n, n)

    def _write(self, n: Node) -> None:
        at, new = self.source[n], self._written(n)
        holds = {n: new, at: new}
        while at in self.source:
            above = self.source[at]
            new = new if at in self.writing else self._put_back(at, self._read(above), new)
            if isinstance(value(above), Tensor):
                holds[above] = new
            at = above
        self.version[at] += 1
        self.now |= holds
        self.seen |= dict.fromkeys(holds, self.version[at])

    def _written(self, n: Node) -> Node:
        """The tensor that the write would have left."""
        target, like = _twin(n), self.source[n]
        x, *rest = n.args or [n.kwargs["input"]]
        kwargs: dict[str, Any] = {k: v for k, v in n.kwargs.items() if k not in ("input", "inplace")}
        if target is set_item:
            index, values = rest if called(n) is operator.setitem else (Ellipsis, *rest, *kwargs.values(), 0)[:2]
            return self._new(like, "call_function", set_item, (x, index, values))
        if (place := flag_of(n)) is not None:
            rest = rest[: place - 1]
        new = self._new(like, "call_method" if isinstance(target, str) else "call_function", target, (x, *rest), kwargs)
        new.meta["stack_trace"] = n.meta.get("stack_trace")
        dtypes = {t.dtype for m in new.all_input_nodes if isinstance(t := value(m), Tensor)}
        same = dtypes == {value(like).dtype} and name_of(target) in operators.KEEP_DTYPE
        return new if same else self._new(like, "call_method", "to", (new, value(like).dtype))

    def _put_back(self, view: Node, base: Node, new: Node) -> Node:
        """The base of a view that has changed."""
        source, target, name = self.source[view], called(view), name_of(called(view))
        if target is operator.getitem and isinstance(value(source), Tensor):
            return self._new(source, "call_function", set_item, (base, view.args[1], new))
        if target is operator.getitem:
            at: Any = view.args[1]
            return self._parts(source, base, {at % len(value(source)): new})
        if name in _PARTS or target in operators.CASTS:
            return new
        if name == "permute":
            order: Any = view.args[1:] if len(view.args) > 2 else view.args[1]
            back = [[d % len(order) for d in order].index(i) for i in range(len(order))]
            return self._new(source, "call_method", "permute", (new, *back))
        if name in _SWAPS:
            return self._new(source, view.op, view.target, (new, *view.args[1:]), view.kwargs)
        return self._new(source, "call_method", "reshape_as", (new, base))

    def _parts(self, pieces: Node, base: Node, new: dict[int, Node]) -> Node:
        """What the pieces are of, one of them new."""
        n, name = len(value(pieces)), name_of(called(pieces))
        place = _PARTS[name]
        dim: Any = pieces.args[place] if len(pieces.args) > place else pieces.kwargs.get("dim", 0)
        each: Any = [new.get(i) or self._new(pieces, "call_function", operator.getitem, (base, i)) for i in range(n)]
        join = torch.stack if name == "unbind" else torch.cat
        return self._new(self.source[pieces], "call_function", join, (each, dim))


def _twin(node: Node) -> Any:
    """What returns a new tensor where the node writes in place; None if that is not known."""
    target, name = called(node), name_of(called(node))
    if target is operator.setitem or name in _BY_VALUE:
        return set_item
    if flag_of(node) is not None:
        return target
    if name in operators.NO_TWIN or node.kwargs.get("out") is not None:
        return None
    if getattr(target, "__module__", "") == "_operator":
        return getattr(operator, name[1:], None)
    found = [getattr(m, name[:-1], None) for m in ((Tensor,) if isinstance(target, str) else (torch, F))]
    twin = next((f for f in found if callable(f)), None) if name.endswith("_") else None
    return name[:-1] if twin is not None and isinstance(target, str) else twin


def _known_view(node: Node) -> bool:
    name = name_of(called(node))
    known = {*_SWAPS, *_PARTS, "getitem", "permute", "squeeze"}
    return name in known or called(node) in operators.CASTS | operators.RESHAPES
