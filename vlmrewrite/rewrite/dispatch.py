"""Dispatch: whole plans to choose among at run time, with what they have in common computed once.

The rewritten graphs of all variants are cut where their plans part. Nodes that mean the same get the same number
(operation, and numbers of the arguments), so that the head, taken from one variant, serves the tails of all.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

from vlmrewrite.analysis import needed, writes
from vlmrewrite.plan import Extra
from vlmrewrite.rewrite.legalize import Rewritten, with_blocks


@dataclass(frozen=True)
class Parted:
    """A family of graphs, cut.

    Attributes:
        head: the captured inputs and ``extras`` to a tuple of values: the choice's value first.
        extras: the head's additional inputs.
        tails: for each variant, the captured inputs, its own extras and its ``takes`` of the head's values to what the
            whole graph returns.
        takes: for each tail, which of the head's values it takes.
    """

    head: torch.fx.GraphModule
    extras: tuple[Extra, ...]
    tails: tuple[torch.fx.GraphModule, ...]
    takes: tuple[tuple[int, ...], ...]


class _Numbers:
    """Value numbers, shared by all graphs that are numbered."""

    def __init__(self) -> None:
        self._known: dict[object, int] = {}

    def of(self, rewritten: Rewritten) -> dict[Node, int]:
        graph = rewritten.graph_module.graph
        out: dict[Node, int] = {}
        inputs = [n for n in graph.nodes if n.op == "placeholder"]
        captured = len(inputs) - len(rewritten.extras)
        for i, node in enumerate(inputs):
            key: object = ("input", i) if i < captured else ("extra", rewritten.extras[i - captured])
            out[node] = self._number(key)
        for node in graph.nodes:
            if node.op not in ("placeholder", "output"):
                args: Any = map_arg((node.args, node.kwargs), lambda n: _Number(out[n]))  # type: ignore[arg-type, return-value]
                out[node] = self._number((node.op, node.target, _frozen(args)))
        return out

    def _number(self, key: object) -> int:
        return self._known.setdefault(key, len(self._known))


@dataclass(frozen=True)
class _Number:
    value: int


def _frozen(x: Any) -> object:
    if isinstance(x, (list, tuple)):
        return type(x).__name__, tuple(map(_frozen, x))
    if isinstance(x, dict):
        return "dict", tuple((k, _frozen(v)) for k, v in x.items())
    if isinstance(x, slice):
        return "slice", _frozen(x.start), _frozen(x.stop), _frozen(x.step)
    return type(x).__name__, x


def part(variants: Sequence[Rewritten]) -> Parted:
    """Cut the graphs of several variants where their ``frontier`` is; the graphs themselves are not changed."""
    numbers = _Numbers()
    numbered = [numbers.of(r) for r in variants]
    first = variants[0]
    common = {numbered[0][n] for n in needed(first.frontier)}
    for node, number in numbered[0].items():
        if node.target is operator.getitem and numbered[0][node.all_input_nodes[0]] in common:
            common.add(number)  # what crosses is a tensor, never the tuple that it is an item of
    for r, of in zip(variants, numbered, strict=True):
        lacking = [n.name for n in r.frontier if of[n] not in common]
        if lacking:
            raise ValueError(f"the variants differ before the point where they part, in {', '.join(lacking)}")
    crossing: dict[int, None] = {numbered[0][n]: None for n in first.frontier[:1]}
    for r, of in zip(variants, numbered, strict=True):
        for node in r.graph_module.graph.nodes:
            if node.op == "output" or of[node] not in common:
                crossing |= {of[n]: None for n in node.all_input_nodes if of[n] in common and n.op != "placeholder"}
    order = list(crossing)
    head = _head(first, numbered[0], order)
    cut = [_tail(r, of, common, order) for r, of in zip(variants, numbered, strict=True)]
    return Parted(head, first.extras, tuple(gm for gm, _ in cut), tuple(takes for _, takes in cut))


def _head(r: Rewritten, of: dict[Node, int], order: list[int]) -> torch.fx.GraphModule:
    graph, env = torch.fx.Graph(), dict[Node, Node]()
    graph.graph_copy(r.graph_module.graph, env)
    made = {of[n]: env[n] for n in reversed(r.graph_module.graph.nodes) if n in env}
    graph.output(tuple(made[number] for number in order))
    graph.eliminate_dead_code(is_impure_node=writes)
    return with_blocks(r.graph_module, graph)


def _tail(
    r: Rewritten, of: dict[Node, int], common: set[int], order: list[int]
) -> tuple[torch.fx.GraphModule, tuple[int, ...]]:
    graph, env = torch.fx.Graph(), dict[Node, Node]()
    nodes = list(r.graph_module.graph.nodes)
    for node in nodes:
        if node.op == "placeholder":
            env[node] = graph.node_copy(node)
    taken: dict[int, Node] = {}
    for node in nodes:
        for source in node.all_input_nodes if node.op == "output" or of[node] not in common else ():
            if source.op != "placeholder" and of[source] in common and of[source] not in taken:
                taken[of[source]] = graph.placeholder(f"vlm_head_{len(taken)}")
    for node in nodes:
        if node.op == "output":
            graph.output(map_arg(node.args[0], env.__getitem__))
        elif of[node] in common and node.op != "placeholder":
            if of[node] in taken:
                env[node] = taken[of[node]]
        elif node.op != "placeholder":
            env[node] = graph.node_copy(node, env.__getitem__)
    return with_blocks(r.graph_module, graph), tuple(order.index(number) for number in taken)
