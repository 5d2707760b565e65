"""A lowered graph in pieces, so that a compiler is given each kind of layer once, however many layers there are of it.

A layer is what lies between two nodes that everything goes through on its way from one attention (or recurrence) to the
next. Layers that do the same with other tensors are one piece, which is called for each of them; what is in no such
layer is in pieces before, between and behind them.
"""

from __future__ import annotations

import copy
import functools
import logging
import operator
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import networkx as nx
import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from vlmrewrite import ops
from vlmrewrite.analysis import CASTING, cast, closure, value, written
from vlmrewrite.compat import autocast_marks, inductor
from vlmrewrite.lower.recompute import MIXERS
from vlmrewrite.ops import Running
from vlmrewrite.rewrite import with_blocks

_LOG = logging.getLogger(__name__)

AT_ONCE = 4
"""Most layers that are called at once."""

_OUTSIDE = ("placeholder", "get_attr", "output")


def positions_apart(graph: Graph) -> None:
    """Let the positions of what a cache holds be made of those that are added, so that masks wait for no keys."""
    appends = [n for n in graph.nodes if n.target in (ops.KV_APPEND, ops.kv_append) and n.args[2] is not None]
    for grown in appends:
        with graph.inserting_before(grown):
            made = graph.call_function(torch.cat, ([grown.args[2], grown.args[5]], 1))
        for item in [user for user in grown.users if user.args == (grown, 2)]:
            made.meta = dict(item.meta)
            item.replace_all_uses_with(made)
            graph.erase_node(item)


class _Compiled(nn.Module):
    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *inputs: Any) -> Any:
        return self.run(*inputs)


class _Part:
    """Some nodes of a graph.

    Attributes:
        nodes: in the graph's order, or in that of the part that it is a twin of; of a layer, the last is its result.
        takes: what they take from outside, likewise.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes, self.inside = nodes, set(nodes)
        self.takes = [*dict.fromkeys(m for n in nodes for m in n.all_input_nodes if m not in self.inside)]

    @functools.cached_property
    def key(self) -> object:
        """The same for parts that do the same."""
        said, place = list[object](), {n: i for i, n in enumerate((*self.nodes, *self.takes))}
        for n in place:
            what, given = _said(n, n in self.inside)
            said.append((repr(what), *map(place.__getitem__, given)))
        return tuple(said)

    @property
    def gives(self) -> list[int]:
        """Which are used outside."""
        return [i for i, n in enumerate(self.nodes) if n.users.keys() - self.inside]

    def twin(self, end: Node, mixer: Node) -> _Part | None:
        """The part around ``mixer`` that ends at ``end``, if it does the same."""
        to, waiting = {self.nodes[-1]: end}, [self.nodes[-1]]
        while waiting:
            a = waiting.pop()
            (what, given), (other, found) = (_said(n, a in self.inside) for n in (a, to[a]))
            if what != other:
                return None
            for m, n in zip(given, found, strict=True):
                if m not in to:
                    to[m] = n
                    waiting.append(m)
                elif to[m] is not n:
                    return None
        made = _Part([to[n] for n in self.nodes])
        made.takes = [to[n] for n in self.takes]
        return made if mixer in made.inside and len(made.inside) == len(self.nodes) else None

    def convex(self, order: Mapping[Node, int]) -> bool:
        """Whether nothing that it takes depends on something in it."""
        last = max(map(order.__getitem__, self.nodes))
        behind = closure(self.nodes, lambda n: (m for m in n.users if order.get(m, last) < last)) - self.inside
        return not any(m in self.inside for n in behind for m in n.users)

    def module(self, gm: GraphModule, gives: Sequence[int]) -> GraphModule:
        """It by itself, with these of its nodes as results."""
        graph, env = Graph(), dict[Node, Node]()
        for n in self.takes:
            env[n] = graph.placeholder(n.name)
            env[n].meta = dict(n.meta)
        for n in self.nodes:
            env[n] = graph.node_copy(n, env.__getitem__)
        graph.output(tuple(env[self.nodes[i]] for i in gives))
        cast(graph)
        return with_blocks(gm, graph)


def _said(n: Node, inside: bool) -> tuple[Any, list[Node]]:
    """What a node does, and the nodes that it does it to; of one outside, the layout of a parameter."""
    if not inside:
        x = value(n)
        return ((x.dtype, x.shape) if isinstance(x, nn.Parameter) else None,), []
    given = list[Node]()
    text = repr(map_arg((n.args, n.kwargs), lambda m: given.append(m) or "%"))  # type: ignore[func-returns-value]
    return (n.op, n.target, text, n.meta.get(CASTING)), given


def _absorbed(layers: Sequence[_Part], free: Container[Node]) -> set[Node]:
    """Take into each of several layers of a kind something alike that only it takes; what that was, if anything."""
    for i in range(len(layers[0].takes)) if len(layers) > 1 else ():
        said, takes = list[Any](), list[list[Node]]()
        for layer in layers:
            n = layer.takes[i]
            what, given = _said(n, n in free and n.users.keys() <= layer.inside)
            rest = [*layer.takes[:i], *layer.takes[i + 1 :], *given]
            said.append((what, [rest.index(m) for m in rest]))
            takes.append([n, *dict.fromkeys(rest)])
        if len(said[0][0]) == 4 and said.count(said[0]) == len(said):
            for layer, (n, *rest) in zip(layers, takes, strict=True):
                layer.nodes, layer.takes = [n, *layer.nodes], rest
                layer.inside.add(n)
            return {n for n, *_ in takes}
    return set()


def _marked(nodes: Sequence[Node], marked: Sequence[Node]) -> dict[Node, int]:
    """For each node, as bits, which of the marked ones it is or depends on."""
    found = {n: 1 << i for i, n in enumerate(marked)}
    for n in nodes:
        found[n] = functools.reduce(operator.or_, (found[m] for m in n.all_input_nodes if m in found), found.get(n, 0))
    return found


def _layers(graph: Graph, nodes: Sequence[Node]) -> list[tuple[_Part, _Part]]:
    """The layers of a graph, in order, each with the one whose twin it is."""
    order = {n: i for i, n in enumerate(nodes)}
    mixers = [n for n in nodes if n.op == "call_function" and n.target in MIXERS]
    later = _marked(nodes, mixers)
    above = nx.immediate_dominators(nx.DiGraph((m, n) for n in nodes for m in n.users), graph.output_node())

    def ends(i: int) -> Iterator[Node]:  # what everything from this one goes through, before the next one
        at = above.get(mixers[i])
        while at in order and not later[at] >> i + 1:
            yield at
            at = above.get(at)

    possible = [list(ends(i)) for i in range(len(mixers))]
    likely = [found[-1] if found else mixer for mixer, found in zip(mixers, possible, strict=True)]
    behind, kinds = _marked(nodes, likely), Counter[_Part]()
    for i, (begin, end) in enumerate(pairwise(likely[:-1])):
        between = {n for n in nodes if n is not begin and behind[n] >> i & 1}
        inside = closure([end], lambda n, some=between: some.intersection(n.all_input_nodes))  # type: ignore[misc]
        if mixers[i + 1] in inside and end in between:
            found = _Part(sorted(inside, key=order.__getitem__))
            kinds[next((x for x in kinds if x.twin(end, mixers[i + 1])), found)] += 1
    used, layers = set[Node](), list[tuple[_Part, _Part]]()
    for mixer, some in zip(mixers, possible, strict=True):
        tried = ((x.twin(end, mixer), x) for x, _ in kinds.most_common() for end in some)
        for layer, kind in tried:
            if layer is not None and layer.convex(order) and not layer.inside & used:
                layers.append((layer, kind))
                used |= layer.inside
                break
    for kind in kinds:
        twins = [layer for layer, like in layers if like is kind]
        while twins and (more := _absorbed(twins, order.keys() - used)):
            used |= more
    return sorted(layers, key=lambda x: order[x[0].nodes[-1]])


def _stages(nodes: Sequence[Node], layers: Sequence[_Part]) -> list[_Part] | None:
    """The other nodes, by the layer that they run before, and behind the last; None if the layers have no order."""
    of = {n: i for i, layer in enumerate(layers) for n in layer.inside}
    first, last = dict.fromkeys(nodes, 0), dict.fromkeys(nodes, len(layers))
    for n in nodes:
        others = [m for m in n.all_input_nodes if m in first and (m not in of or of[m] != of.get(n))]
        first[n] = max((of[m] + 1 if m in of else first[m] for m in others), default=0)
        if first[n] > of.get(n, len(layers)):
            return None
    for n in reversed(nodes):
        last[n] = min((of.get(m, last[m]) for m in n.users if m in last), default=len(layers))
    stages: list[list[Node]] = [[] for _ in range(len(layers) + 1)]
    for n in nodes:
        if n not in of:
            stages[last[n] if last[n] == len(layers) else first[n]].append(n)
    return list(map(_Part, stages))


def _segments(layers: Sequence[tuple[_Part, _Part]], stages: Sequence[_Part]) -> list[_Part]:
    """All parts in order: stages that hold something, and layers of a kind that follow one another, some at a time.

    A call of what was compiled has a cost of its own. So many layers are called at once as every run of the kind can
    be cut into without a rest, for that would be compiled too. A run ends where others share what they take.
    """
    shared: dict[int, Any] = {}
    for i, ((before, kind), (layer, like)) in enumerate(pairwise(layers), 1):
        if kind is like and not stages[i].nodes:
            shared[i] = kind, tuple(map(operator.is_, before.takes, layer.takes))
    usual = dict(reversed([x for x, _ in Counter(shared.values()).most_common()]))
    runs: list[list[int]] = []
    for i, (_, kind) in enumerate(layers):
        if i in shared and shared[i][1] == usual[kind]:
            runs[-1].append(i)
        else:
            runs.append([i])
    found: list[_Part] = []
    for run in runs:
        kind = layers[run[0]][1]
        lengths = [len(other) for other in runs if layers[other[0]][1] is kind]
        size = next(n for n in range(AT_ONCE, 0, -1) if not any(length % n for length in lengths))
        for i in run[::size]:
            found += [stages[i], _Part([n for layer, _ in layers[i : i + size] for n in layer.nodes])]
    return [part for part in (*found, stages[-1]) if part.nodes]


def behind(gm: GraphModule, backend: Running) -> Callable[..., Any]:
    """A lowered graph behind what is to run it."""
    if backend == "inductor":
        return _in_pieces(gm)
    return gm if backend == "eager" else inductor(gm)


def _in_pieces(gm: GraphModule) -> Callable[..., Any]:
    """A lowered graph behind Inductor, which is given each kind of layer once.

    Where no two layers do the same, or something is written in place, it is one piece.
    """
    graph, marks = copy.deepcopy(gm.graph), autocast_marks()
    positions_apart(graph)
    root, made, env = with_blocks(gm, graph), Graph(), dict[Node, Node]()
    nodes = [n for n in graph.nodes if n.op not in _OUTSIDE and n.target not in marks]
    writes = any(map(written, nodes))
    layers = [] if writes else _layers(graph, nodes)
    stages = _stages(nodes, [layer for layer, _ in layers])
    if stages is None or len({kind for _, kind in layers}) == len(layers):
        why = "something is written in place" if writes else "no two layers were found to do the same"
        _LOG.info("Inductor is given one piece: %s", why)
        return inductor(gm)
    for n in graph.nodes:
        if n.op in ("placeholder", "get_attr"):
            env[n] = made.node_copy(n)
    alike: dict[object, list[_Part]] = {}
    parts = _segments(layers, stages)
    for part in parts:
        alike.setdefault(part.key, []).append(part)
    gives = {key: sorted({i for part in some for i in part.gives}) for key, some in alike.items()}
    names = {key: f"piece_{i}" for i, key in enumerate(alike)}
    for key, (first, *_) in alike.items():
        root.add_module(names[key], _Compiled(inductor(first.module(gm, gives[key]))))
    for part in parts:
        out = made.call_module(names[part.key], tuple(env[n] for n in part.takes))
        env.update(
            (part.nodes[k], made.call_function(operator.getitem, (out, i))) for i, k in enumerate(gives[part.key])
        )
    made.output(map_arg(graph.output_node().args[0], env.__getitem__))
    _LOG.info("Inductor is given %d pieces for %d layers, called %d times", len(alike), len(layers), len(parts))
    return with_blocks(root, made)
