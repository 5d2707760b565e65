"""Stand-ins that layers leave in a trace, and the copies of a traced layer that take their place."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from vlmrewrite.analysis import VERDICT, closure, is_number, same, sizes, symbols, value, where, written
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.ops import KV_APPEND


class UnlikeError(Exception):
    """A layer cannot be copied after all: the whole model is to be traced."""


def reason_of(failed: Exception) -> str | None:
    """What an :class:`UnlikeError` in a trace said, of which Dynamo's error is; None of another error."""
    found = re.search(rf"{UnlikeError.__name__}\((['\"])(.*?)\1\)", str(failed))
    return found and found[2]


def enter(layer: int, tensors: tuple[Tensor, ...], rest: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """A traced layer begins here, with these arguments."""
    return tuple(x.view_as(x) for x in tensors)


def leave(layer: int, x: Tensor) -> Tensor:
    """A traced layer's result [B, T, H]."""
    return x.view_as(x)


def keys_of(
    layer: int, source: int, tensors: tuple[Tensor, ...], rest: tuple[Any, ...], k: Tensor, v: Tensor
) -> tuple[Tensor, ...]:
    """Keys and values of a layer with these arguments; ``k`` and ``v`` are what layer ``source``, traced, holds."""
    return tuple(x.new_empty((x.shape[0], x.shape[1], tensors[0].shape[1], x.shape[3])) for x in (k, v))


def result_of(layer: int, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """A layer's result [B, T, H], of its first argument and all that it holds."""
    return torch.empty_like(x)


for _stands in (enter, leave, keys_of, result_of):
    torch.compiler.allow_in_graph(_stands)


@functools.cache  # the same for each model: Dynamo guards on it
def traced(layer: int) -> Callable[..., Tensor]:
    """A layer's forward that says where it begins and ends."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        tensors, rest, _ = _apart(args, kwargs)
        given = iter(enter(layer, tuple(tensors), tuple(rest)))
        args = _with(args, given)
        out = type(self).forward(self, *args, **{name: _with(x, given) for name, x in kwargs.items()})
        if not isinstance(out, Tensor):
            raise UnlikeError("more than a hidden state comes out of a layer")
        return leave(layer, out)

    return forward


@functools.cache
def stands_in(layer: int, source: int) -> Callable[..., Tensor]:
    """A layer's forward that appends to the cache as layer ``source`` does, and leaves the rest to a copy of it."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        tensors, rest, caches = _apart(args, kwargs)
        if len(caches) != 1 or len(caches[0].layers) <= source:
            raise UnlikeError("a layer does not append to the cache")
        held = caches[0].layers[source]
        k, v = keys_of(layer, source, tuple(tensors), tuple(rest), held.keys, held.values)
        keys, values = caches[0].update(k, v, layer)
        return result_of(layer, tensors[0], keys, values)

    return forward


def _apart(args: Any, kwargs: Any) -> tuple[list[Tensor], list[Any], list[PositionCache]]:
    """A layer's arguments: its tensors, its constants and the cache."""
    tensors: list[Tensor] = []
    rest: list[Any] = [len(args), *kwargs]
    caches: list[PositionCache] = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            tensors.append(x)
        elif isinstance(x, PositionCache):
            caches.append(x)
        elif isinstance(x, tuple):
            found = _apart(x, {})
            tensors, rest, caches = tensors + found[0], rest + found[1], caches + found[2]
        elif x is None or isinstance(x, (bool, int, float, str, torch.dtype, torch.SymInt)):
            rest.append(x)
        else:
            raise UnlikeError(f"a layer is given a {type(x).__name__}, which it may write to")
    return tensors, rest, caches


def _with(x: Any, tensors: Iterator[Tensor]) -> Any:
    """An argument with other tensors, in their order."""
    if isinstance(x, tuple):
        return tuple([_with(one, tensors) for one in x])
    return next(tensors) if isinstance(x, Tensor) else x


def expand(graph: Graph, named: Mapping[int, Mapping[Node, str]], again: Mapping[int, int]) -> list[tuple[int, str]]:
    """Put copies of traced layers in the place of the stand-ins in a captured graph.

    Args:
        graph: changed in place.
        named: for each traced layer, which of the graph's inputs are tensors of its own, by their names in it.
        again: for some traced layers, another one that must have left the same.

    Returns:
        the layer and the name of each tensor that the graph now takes, in order, behind its other inputs.

    Raises:
        UnlikeError: two layers left different things, or something that may differ in a copy; the graph is not used.
    """
    enters = {cast(int, n.args[0]): n for n in graph.find_nodes(op="call_function", target=enter)}
    if enters.keys() != named.keys():
        raise UnlikeError(f"layers {sorted(enters)} ran in the trace; expected {sorted(named)}")
    bodies = {i: _Body(node, named[i]) for i, node in enters.items()}
    for i, like in again.items():
        bodies[like].compare(bodies[i])
    taken: list[tuple[int, str]] = []
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for stand_in in graph.find_nodes(op="call_function", target=keys_of):
        taken += bodies[cast(int, stand_in.args[1])].copy(graph, stand_in, first)
    for body in bodies.values():
        tensors = cast(tuple[tuple[Node, ...], ...], body.enter.args)[1]
        for item in list(body.enter.users):
            item.replace_all_uses_with(tensors[cast(int, item.args[1])])
            graph.erase_node(item)
        body.leave.replace_all_uses_with(cast(Node, body.leave.args[1]))
        graph.erase_node(body.leave)
        graph.erase_node(body.enter)
    graph.lint()
    return taken


class _Body:
    """What a traced layer left in a graph.

    Attributes:
        enter, leave, append: where it begins and ends, and where its keys and values are appended to the cache.
        named: which of the graph's inputs are tensors of its own.
        before, behind: the nodes before and behind that which it needs.
    """

    def __init__(self, enter: Node, named: Mapping[Node, str]) -> None:
        self.enter, self.named, inside = enter, named, [enter.next]
        while inside[-1].target is not leave:
            inside.append(inside[-1].next)
        self.leave, layer = inside.pop(), set(inside)
        appends = [n for n in inside if n.target is KV_APPEND]
        if len(appends) != 1:
            raise UnlikeError(f"layer {enter.args[0]} appends {len(appends)} times to the cache")
        self.append = appends[0]

        def needed(ends: Any) -> set[Node]:
            return closure(ends, lambda n: () if n is self.append else (m for m in n.all_input_nodes if m in layer))

        every, at = needed([*cast(Any, self.append.args[3:5]), self.leave.args[1]]), inside.index(self.append)
        self.before, self.behind = ([n for n in part if n in every] for part in (inside[:at], inside[at + 1 :]))
        told = set().union(*(symbols(n) for x in self.tensors for n in sizes(x)))
        nodes = {*self.before, *self.behind}
        for n in nodes:
            outside = [m for m in n.all_input_nodes if m not in layer and m is not enter and m not in named]
            if written(n) or not all(is_number(m) and symbols(m) <= told for m in outside):
                raise UnlikeError(f"layer {enter.args[0]} needs more than its arguments, or writes: {where(n)}")
            if n.users.keys() - {*nodes, self.append, self.leave} and self.append not in n.all_input_nodes:
                raise UnlikeError(f"what layer {enter.args[0]} computes is used outside: {where(n)}")

    @property
    def tensors(self) -> tuple[Node, ...]:
        """Those that it was given."""
        return cast(tuple[tuple[Node, ...], ...], self.enter.args)[1]

    def compare(self, other: _Body) -> None:
        """Raise UnlikeError where another traced layer left something else."""
        names = {name: node for node, name in other.named.items()}
        to = {node: names.get(name) for node, name in self.named.items()} | {self.append: other.append}
        to |= {self.enter: other.enter}
        mine, theirs = self.before + self.behind, other.before + other.behind
        to |= dict(zip(mine, theirs, strict=False))

        def text(*what: Any, to: Mapping[Node, Any] = MappingProxyType({})) -> str:
            return repr(map_arg(what, lambda n: to.get(n, n)))

        for a, b in zip(mine, theirs, strict=False):
            if text(a.op, a.target, a.args, a.kwargs, to=to) != text(b.op, b.target, b.args, b.kwargs):
                raise UnlikeError(
                    f"layers {self.enter.args[0]} and {other.enter.args[0]} differ: {where(a)}, {where(b)}"
                )
        ends = [
            (x.enter.args[2], x.append.args[3:5], x.leave.args[1], len(x.before), len(x.behind)) for x in (self, other)
        ]
        if text(*ends[0], to=to) != text(*ends[1]) or not all(map(_fits, self.tensors, other.tensors)):
            raise UnlikeError(f"layers {self.enter.args[0]} and {other.enter.args[0]} differ in what they take or give")

    def copy(self, graph: Graph, stand_in: Node, first: Node) -> list[tuple[int, str]]:
        """Put a copy in the place of a stand-in, whose part of the cache it keeps; its inputs go before ``first``."""
        layer, _, tensors, rest = cast(tuple[int, int, tuple[Node, ...], Any], stand_in.args[:4])
        pairs = zip((*self.tensors, cast(Node, self.leave.args[1])), (*tensors, tensors[0]), strict=True)
        if repr(rest) != repr(self.enter.args[2]) or not all(_fits(a, b) for a, b in pairs):
            raise UnlikeError(f"layers {self.enter.args[0]} and {layer} take different arguments")
        append = next(n for user in stand_in.users for n in user.users if n.target is KV_APPEND)
        result = next(n for item in append.users for n in item.users if n.target is result_of)
        to: dict[Node, Node] = {n: tensors[cast(int, n.args[1])] for n in self.enter.users}
        to |= {n: next(m for m in append.users if m.args[1] == n.args[1]) for n in self.append.users}
        used = dict.fromkeys(m for n in self.before + self.behind for m in n.all_input_nodes if m in self.named)
        with graph.inserting_before(first):
            for node in used:
                to[node] = made = graph.placeholder(f"{node.name}_of_layer_{layer}")
                made.meta = dict(node.meta)
        depth = list(stand_in.meta["nn_module_stack"].items())
        for nodes, place in ((self.before, stand_in), (self.behind, result)):
            with graph.inserting_before(place):
                for n in nodes:
                    if n not in to:
                        n.meta.setdefault(VERDICT, [])
                        to[n] = made = graph.node_copy(n, lambda m: to.get(m, m))
                        below = list(n.meta.get("nn_module_stack", {}).items())[len(depth) :]
                        made.meta["nn_module_stack"] = dict(depth + [(f"{key} {layer}", x) for key, x in below])
        append.args = (*append.args[:3], *(to[cast(Node, n)] for n in self.append.args[3:5]), *append.args[5:])
        result.replace_all_uses_with(to[cast(Node, self.leave.args[1])])
        for node in (result, *stand_in.users, stand_in):
            graph.erase_node(node)
        return [(layer, self.named[node]) for node in used]


def _fits(a: Node, b: Node) -> bool:
    """Whether two tensors are of the same dtype and shape."""
    x, y = value(a), value(b)
    return x.dtype == y.dtype and x.dim() == y.dim() and all(map(same, x.shape, y.shape))
