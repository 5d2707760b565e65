"""Dispatch: whole plans to choose among at run time, with what they have in common computed once.

The rewritten graphs of all variants are cut where their plans part. Nodes that mean the same get the same number
(operation, and numbers of the arguments), so that the head, taken from one variant, serves the tails of all. It holds
what comes before that point, and what does not come of it, as masks. It runs for all rows, a tail for those that follow
its plan.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from vlmrewrite.analysis import ALONG, Anatomy, Rows, needed, reachable, value, writes
from vlmrewrite.compat import tree_leaves
from vlmrewrite.errors import shown
from vlmrewrite.ops import Along, Run, joined
from vlmrewrite.plan import All, Call, Chooser, Selection
from vlmrewrite.rewrite.legalize import Rewritten, with_blocks


@dataclass(frozen=True)
class Dispatch:
    """The graphs of the plans to choose among in each call, cut where they part.

    Attributes:
        head: the captured inputs and the extras of the first plan's graph to a tuple of values: the choice's first.
        tails: for each plan, the captured inputs, its own extras and its ``takes`` of the head's values to what the
            whole graph returns.
        takes: for each tail, which of the head's values it takes.
        gives: by their places, the captured outputs that are the head's, and which of its values; tails return None.
        cuts: for each tail, where the captured inputs, and behind them what it takes, hold rows; or why it cannot run
            for some of them.
        joins: how each captured output of tails is put together from that of some rows at a time, a :class:`Join`; None
            where it is the same for all rows; or why it cannot be.
        together: why all rows follow one plan, or None: each follows its own.
    """

    head: torch.fx.GraphModule
    tails: tuple[torch.fx.GraphModule, ...]
    takes: tuple[tuple[int, ...], ...]
    gives: dict[int, int]
    cuts: tuple[tuple[Along, ...] | str, ...]
    joins: tuple[Any, ...]
    together: str | None

    def each(self, chooser: Chooser, found: object, rows: int) -> list[int]:
        """The plan that a chooser chose for each of some rows; the same for all, where they follow one plan.

        Raises:
            ValueError: it is the number of none.
        """
        n = len(self.tails)
        each: list[Any] = found.tolist() if isinstance(found, Tensor) and found.shape == (rows,) else [found] * rows
        for i in each:
            if type(i) is not int or not 0 <= i < n:
                raise ValueError(f"{chooser} chose variant {shown(i)}; expected an int in 0 .. {n - 1}")
        return each if self.together is None else [max(each)] * rows

    def joined(self, kept: Sequence[tuple[Run, Any]], shared: Sequence[Any]) -> list[Any]:
        """The captured outputs.

        Args:
            kept: the runs whose results rows keep, and what they returned.
            shared: what the head made.
        """
        out = joined([x for _, x in kept], self.joins, [run for run, _ in kept])
        return [shared[self.gives[i]] if i in self.gives else x for i, x in enumerate(out)]


def chosen_by(kept: Sequence[tuple[Run, dict[Selection, Tensor]]], call: Call) -> dict[Selection, Tensor]:
    """What selections chose, bool [F] for all rows of a call; nothing in those that followed a plan without them.

    Args:
        kept: the runs that rows kept, and what each of its selections chose, bool [f] for the rows it ran for.
        call: that of all rows.
    """
    if len(kept) == 1:
        return kept[0][1]
    found: dict[Selection, Tensor] = {}
    for run, chosen in kept:
        ran, keep = (call.tokens_of(torch.tensor(x, device=call.vision.device)) for x in (run.rows, run.kept))
        nothing = torch.zeros_like(ran)
        for s, x in chosen.items():
            found[s] = found.get(s, nothing) | (nothing.masked_scatter(ran, x) & keep)
    return found


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


def dispatch(variants: Sequence[Rewritten], captured: torch.fx.Graph, anatomy: Anatomy) -> Dispatch:
    """Cut the rewritten graphs of a plan's variants where their ``frontier`` is; the graphs are not changed.

    Args:
        variants: what legalize made of each plan.
        captured, anatomy: what it made them of.
    """
    numbered, first = _numbered(variants), variants[0]
    apart = [{of[n] for n in of.keys() - reachable(r.frontier)} for r, of in zip(variants, numbered, strict=True)]
    tensors = {numbered[0][n] for n in numbered[0] if isinstance(value(n), Tensor) or ALONG in n.meta}
    common = {numbered[0][n] for n in needed(first.frontier)} | tensors.intersection(*apart)
    for node, number in numbered[0].items():
        if node.target is operator.getitem and numbered[0][node.all_input_nodes[0]] in common:
            common.add(number)  # what crosses is a tensor, never the tuple that it is an item of
    for r, of in zip(variants, numbered, strict=True):
        lacking = [n.name for n in r.frontier if of[n] not in common]
        if lacking:
            raise ValueError(f"the variants differ before the point where they part, in {', '.join(lacking)}")
    known = common | {number for node, number in numbered[0].items() if node.op == "placeholder"}
    outputs = zip(*([of.get(x) for x in _outputs(r)] for r, of in zip(variants, numbered, strict=True)), strict=True)
    shared = {i: each[0] for i, each in enumerate(outputs) if len({*each}) == 1 and each[0] in known}
    rows, outs = Rows(captured, anatomy), captured.output_node().args[0]
    cut = [_tail(r, of, common, shared, rows) for r, of in zip(variants, numbered, strict=True)]
    read = [numbered[0][n] for n in first.frontier[:1]]
    order = list(dict.fromkeys([*read, *(number for _, taken, _ in cut for number in taken), *shared.values()]))
    joins = [None if i in shared else rows.join(x) for i, x in enumerate(outs)]  # type: ignore[arg-type]
    return Dispatch(
        _head(first, numbered[0], order),
        tuple(tail for tail, *_ in cut),
        tuple(tuple(map(order.index, taken)) for _, taken, _ in cut),
        {i: order.index(number) for i, number in shared.items()},
        tuple(cuts for *_, cuts in cut),
        tuple(joins),
        next((x for x in (*(cuts for *_, cuts in cut), *joins) if isinstance(x, str)), None),
    )


def _outputs(r: Rewritten) -> Any:
    return r.graph_module.graph.output_node().args[0][0]  # type: ignore[index]


def _head(r: Rewritten, of: dict[Node, int], order: list[int]) -> torch.fx.GraphModule:
    graph, env = torch.fx.Graph(), dict[Node, Node]()
    graph.graph_copy(r.graph_module.graph, env)
    made = {of[n]: env[n] for n in reversed(r.graph_module.graph.nodes) if n in env}
    graph.output(tuple(made[number] for number in order))
    graph.eliminate_dead_code(is_impure_node=writes)
    return with_blocks(r.graph_module, graph)


def _tail(
    r: Rewritten, of: dict[Node, int], common: set[int], shared: Mapping[int, int], rows: Rows
) -> tuple[torch.fx.GraphModule, list[int], tuple[Along, ...] | str]:
    """What a variant does with values of the common part, without outputs that are ``shared``.

    Returns:
        its graph, which of the common values it takes, and where the captured inputs that it uses and these hold rows,
        or why it cannot run for some of them.
    """
    graph, nodes = torch.fx.Graph(), list(r.graph_module.graph.nodes)
    given = [node for node in nodes if node.op == "placeholder"]
    env = {node: graph.node_copy(node) for node in given}
    outputs, selected = nodes[-1].args[0]
    returned = tuple(None if i in shared else x for i, x in enumerate(outputs)), selected
    wanted = [n for n in tree_leaves(returned) if isinstance(n, Node)]
    needs = needed([*wanted, *filter(writes, nodes[:-1])], {n for n in of if of[n] in common})
    own = [n for n in nodes if n in needs and n.op != "placeholder" and of[n] not in common]
    taken: dict[int, tuple[Node, Node]] = {}
    for source in [n for node in own for n in node.all_input_nodes] + wanted:
        if source.op != "placeholder" and of[source] in common:
            if of[source] not in taken:
                taken[of[source]] = source, graph.placeholder(f"vlm_head_{len(taken)}")
            env[source] = taken[of[source]][1]
    for node in own:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(map_arg(returned, env.__getitem__))
    some, cuts = {node for node, tokens in r.typed.items() if tokens != All}, list[Along]()
    made = with_blocks(r.graph_module, graph), list(taken)
    try:
        for node in (n for n in own if n not in some):
            rows.check_apart(node)
        cuts += [rows.along(node) if env[node].users else None for node in given[: len(given) - len(r.extras)]]
        return *made, (*cuts, *(rows.along(node, node in some) for node, _ in taken.values()))
    except ValueError as e:
        return *made, str(e)
