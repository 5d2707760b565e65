"""Dispatch: whole plans to choose among at run time, with what they have in common computed once.

The rewritten graphs of all variants are cut where their plans part. Nodes that mean the same get the same number
(operation, and numbers of the arguments), so that the head, taken from one variant, serves the tails of all.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

from vlmrewrite.analysis import needed, writes
from vlmrewrite.errors import shown
from vlmrewrite.plan import Chooser
from vlmrewrite.rewrite.legalize import Rewritten, with_blocks


@dataclass(frozen=True)
class Dispatch:
    """The graphs of the plans to choose among in each call, cut where they part.

    Attributes:
        head: the captured inputs and the extras of the first plan's graph to a tuple of values: the choice's first.
        tails: for each plan, the captured inputs, its own extras and its ``takes`` of the head's values to what the
            whole graph returns.
        takes: for each tail, which of the head's values it takes.
    """

    head: torch.fx.GraphModule
    tails: tuple[torch.fx.GraphModule, ...]
    takes: tuple[tuple[int, ...], ...]


def in_range(chooser: Chooser, i: object, n: int) -> int:
    """What a chooser chose of ``n`` plans.

    Raises:
        ValueError: it is the number of none.
    """
    if type(i) is not int or not 0 <= i < n:
        raise ValueError(f"{chooser} chose variant {shown(i)}; expected an int in 0 .. {n - 1}")
    return i


class _Number(NamedTuple):
    value: int


def _numbered(variants: Sequence[Rewritten]) -> list[dict[Node, int]]:
    """Each graph's nodes with their value numbers, which all graphs share."""
    known: dict[object, int] = {}
    found = []
    for r in variants:
        inputs = r.graph_module.graph.find_nodes(op="placeholder")
        keys = [*range(len(inputs) - len(r.extras)), *r.extras]
        of = {node: known.setdefault(key, len(known)) for node, key in zip(inputs, keys, strict=True)}
        for node in r.graph_module.graph.nodes:
            if node.op not in ("placeholder", "output"):
                args: Any = map_arg((node.args, node.kwargs), lambda n: _Number(of[n]))  # noqa: B023
                key = node.op, node.target, repr(args)  # torch.fx writes the code from it; 1, 1.0, True differ
                of[node] = known.setdefault(key, len(known))
        found.append(of)
    return found


def dispatch(variants: Sequence[Rewritten]) -> Dispatch:
    """Cut the rewritten graphs of a plan's variants where their ``frontier`` is; the graphs are not changed."""
    numbered, first = _numbered(variants), variants[0]
    common = {numbered[0][n] for n in needed(first.frontier)}
    for node, number in numbered[0].items():
        if node.target is operator.getitem and numbered[0][node.all_input_nodes[0]] in common:
            common.add(number)  # what crosses is a tensor, never the tuple that it is an item of
    for r, of in zip(variants, numbered, strict=True):
        lacking = [n.name for n in r.frontier if of[n] not in common]
        if lacking:
            raise ValueError(f"the variants differ before the point where they part, in {', '.join(lacking)}")
    cut = [_tail(r, of, common) for r, of in zip(variants, numbered, strict=True)]
    value = [numbered[0][n] for n in first.frontier[:1]]
    order = list(dict.fromkeys([*value, *(number for _, taken in cut for number in taken)]))
    takes = tuple(tuple(map(order.index, taken)) for _, taken in cut)
    return Dispatch(_head(first, numbered[0], order), tuple(tail for tail, _ in cut), takes)


def _head(r: Rewritten, of: dict[Node, int], order: list[int]) -> torch.fx.GraphModule:
    graph, env = torch.fx.Graph(), dict[Node, Node]()
    graph.graph_copy(r.graph_module.graph, env)
    made = {of[n]: env[n] for n in reversed(r.graph_module.graph.nodes) if n in env}
    graph.output(tuple(made[number] for number in order))
    graph.eliminate_dead_code(is_impure_node=writes)
    return with_blocks(r.graph_module, graph)


def _tail(r: Rewritten, of: dict[Node, int], common: set[int]) -> tuple[torch.fx.GraphModule, list[int]]:
    """What a variant does with values of the common part, and which of them it takes."""
    graph, nodes = torch.fx.Graph(), list(r.graph_module.graph.nodes)
    env = {node: graph.node_copy(node) for node in nodes if node.op == "placeholder"}
    rest = [n for n in nodes if n.op == "output" or (n.op != "placeholder" and of[n] not in common)]
    taken: dict[int, Node] = {}
    for source in (n for node in rest for n in node.all_input_nodes if n.op != "placeholder" and of[n] in common):
        if of[source] not in taken:
            taken[of[source]] = graph.placeholder(f"vlm_head_{len(taken)}")
        env[source] = taken[of[source]]
    for node in rest[:-1]:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(map_arg(rest[-1].args[0], env.__getitem__))
    return with_blocks(r.graph_module, graph), list(taken)
