"""Dispatch: whole plans to choose among at run time, with what they have in common computed once.

The rewritten graphs of all variants are cut where their plans part. Nodes that mean the same get the same number
(operation, and numbers of the arguments), so that the head, taken from one variant, serves the tails of all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vlmrewrite.analysis import needed, writes
from vlmrewrite.errors import shown
from vlmrewrite.plan import Call, Chooser, Extra, Plan
from vlmrewrite.rewrite.legalize import Rewritten, with_blocks


@dataclass(frozen=True)
class Dispatch:
    """Whole plans to choose among in each call, their graphs cut where they part.

    Attributes:
        chooser: who chooses.
        plans: the plans, cheapest first.
        rewritten: the whole graph of each.
        head: the captured inputs and ``extras`` to a tuple of values: the choice's value first.
        extras: the head's additional inputs.
        tails: for each plan, the captured inputs, its own extras and its ``takes`` of the head's values to what the
            whole graph returns.
        takes: for each tail, which of the head's values it takes.
    """

    chooser: Chooser
    plans: tuple[Plan, ...]
    rewritten: tuple[Rewritten, ...]
    head: torch.fx.GraphModule
    extras: tuple[Extra, ...]
    tails: tuple[torch.fx.GraphModule, ...]
    takes: tuple[tuple[int, ...], ...]

    def run(
        self, parts: Sequence[Callable[..., Any]], inputs: Sequence[Any], call: Call, logits_at: int
    ) -> tuple[tuple[int, ...], Any, Tensor | None]:
        """Run what the plans share, ask the chooser, and run one tail after another until it is content.

        Args:
            parts: the head and the tails, lowered or not.
            inputs: the captured graph's flat inputs. call: what describes them.
            logits_at: which of the captured outputs holds the logits.

        Returns:
            the numbers of the plans that ran, last the one whose result is kept; what its graph returned; and what the
            chooser read in the graph.
        """
        chooser, n = self.chooser, len(self.plans)
        shared = parts[0](*inputs, *map(call.fill, self.extras))
        value = None if chooser.op is None else shared[0]
        ran = [self._in_range(chooser.first(value, call.with_images, n))]
        while True:
            tried = ran[-1]
            out = parts[1 + tried](*self.tail_arguments(tried, inputs, call), *(shared[k] for k in self.takes[tried]))
            logits = out[0][logits_at]
            column = (call.last - (call.length - logits.shape[1])).clamp(min=0)  # they may be of the last tokens only
            last = logits.take_along_dim(column[..., None], 1)[:, 0]
            another = chooser.then(tried, last, call.with_images, n)
            if another is None:
                return tuple(ran), out, value
            del out, logits  # their memory is the next one's
            ran.append(self._in_range(another))

    def tail_arguments(self, i: int, inputs: Sequence[Any], call: Call) -> list[Any]:
        """What a tail takes, but for the head's values."""
        return [*inputs, *map(call.fill, self.rewritten[i].extras)]

    def _in_range(self, i: object) -> int:
        if type(i) is not int or not 0 <= i < len(self.plans):
            raise ValueError(f"{self.chooser} chose variant {shown(i)}; expected an int in 0 .. {len(self.plans) - 1}")
        return i


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


def dispatch(plan: Plan, variants: Sequence[Rewritten]) -> Dispatch:
    """Cut the rewritten graphs of a plan's variants where their ``frontier`` is; the graphs are not changed."""
    assert plan.chooser is not None
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
    tails, takes = zip(*cut, strict=True)
    return Dispatch(plan.chooser, plan.variants, tuple(variants), head, first.extras, tails, takes)


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
