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


def enter(layer: int, tensors: tuple[Tensor, ...], rest: tuple[Any, ...], seen: Any) -> tuple[Tensor, ...]:
    """A traced layer begins here, with these arguments; its part of the cache has seen so many tokens."""
    return tuple(x.view_as(x) for x in tensors)


def leave(layer: int, x: Tensor) -> Tensor:
    """A traced layer's result [B, T, H]."""
    return x.view_as(x)


def stand_in(
    layer: int,
    source: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    seen: Any,
    held: tuple[Any, ...],
    like: tuple[Tensor, Tensor, Tensor],
    fixed: bool = False,
) -> tuple[Tensor, ...]:
    """Keys, values and positions that a layer with these arguments holds, and its result [B, T, H].

    Args:
        layer, source: which, and which traced one it is like.
        args, kwargs: what it is given, but for the cache.
        seen, held: tokens that its part of the cache has seen; keys, values and positions there, or None.
        like: what ``source`` holds, this call's tokens included.
        fixed: its part of the cache stays as long as it is.
    """
    x = _apart(args, kwargs)[0][0]
    n = x.shape[1]
    grown = n if held[0] is None else held[0].shape[2] + (0 if fixed else n)
    keys, values = (k.new_empty((k.shape[0], k.shape[1], grown, k.shape[3])) for k in like[:2])
    return keys, values, like[2].new_empty((like[2].shape[0], grown)), torch.empty_like(x)


for _stands in (enter, leave, stand_in):
    torch.compiler.allow_in_graph(_stands)


@functools.cache  # the same for each model: Dynamo guards on it
def traced(layer: int) -> Callable[..., Tensor]:
    """A layer's forward that says where it begins and ends."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        tensors, rest, caches = _apart(args, kwargs)
        there = [cache.layers[layer] for cache in caches if len(cache.layers) > layer]
        given = iter(enter(layer, tuple(tensors), tuple(rest), there[0].seen if there else 0))
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
        cache = kwargs.pop("past_key_values", None)
        if not isinstance(cache, PositionCache) or len(cache.layers) <= source:
            raise UnlikeError("a layer does not append to the cache")
        like, own = cache.layers[source], cache.layer(layer)
        held, there = (own.keys, own.values, own.positions), (like.keys, like.values, like.positions)
        how = (True,) if own.fixed else ()
        *grown, out = stand_in(layer, source, args, kwargs, own.seen, held, there, *how)
        own.took(*grown, out.shape[1])
        return out

    return forward


def _apart(args: Any, kwargs: Any) -> tuple[list[Tensor], list[Any], list[PositionCache]]:
    """A layer's arguments: its tensors, its constants and the cache."""
    tensors: list[Tensor] = []
    rest: list[Any] = [len(args), *(name for name, x in kwargs.items() if not isinstance(x, PositionCache))]
    caches: list[PositionCache] = []
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor) or (isinstance(x, Node) and isinstance(value(x), Tensor)):
            tensors.append(x)  # type: ignore[arg-type]
        elif isinstance(x, PositionCache):
            caches.append(x)
        elif isinstance(x, tuple):
            found = _apart(x, {})
            tensors, rest, caches = tensors + found[0], rest + found[1], caches + found[2]
        elif x is None or isinstance(x, (bool, int, float, str, torch.dtype, torch.SymInt, Node)):
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
    for node in graph.find_nodes(op="call_function", target=stand_in):
        taken += bodies[cast(int, node.args[1])].copy(graph, node, first)
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

        every, at = needed([*cast(Any, self.append.args[3:6]), self.leave.args[1]]), inside.index(self.append)
        self.before, self.behind = ([n for n in part if n in every] for part in (inside[:at], inside[at + 1 :]))
        told = set().union(*(symbols(n) for x in self.tensors for n in sizes(x)))
        nodes = {*self.before, *self.behind}
        for n in nodes:
            outside = [m for m in n.all_input_nodes if m not in layer and m is not enter and m not in named]
            if written(n) or not all(is_number(m) and (m is self.seen or symbols(m) <= told) for m in outside):
                raise UnlikeError(f"layer {enter.args[0]} needs more than its arguments, or writes: {where(n)}")
            if n.users.keys() - {*nodes, self.append, self.leave} and self.append not in n.all_input_nodes:
                raise UnlikeError(f"what layer {enter.args[0]} computes is used outside: {where(n)}")

    @property
    def tensors(self) -> tuple[Node, ...]:
        """Those that it was given."""
        return cast(tuple[tuple[Node, ...], ...], self.enter.args)[1]

    @property
    def seen(self) -> Any:
        """How many tokens its part of the cache has seen: a node, or a number."""
        return self.enter.args[3]

    def compare(self, other: _Body) -> None:
        """Raise UnlikeError where another traced layer left something else."""
        names = {name: node for node, name in other.named.items()}
        to = {node: names.get(name) for node, name in self.named.items()} | {self.append: other.append}
        to |= {self.enter: other.enter} | ({self.seen: other.seen} if isinstance(self.seen, Node) else {})
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
            (x.enter.args[2:], x.append.args[3:], x.leave.args[1], len(x.before), len(x.behind)) for x in (self, other)
        ]
        if text(*ends[0], to=to) != text(*ends[1]) or not all(map(_fits, self.tensors, other.tensors)):
            raise UnlikeError(f"layers {self.enter.args[0]} and {other.enter.args[0]} differ in what they take or give")

    def copy(self, graph: Graph, place: Node, first: Node) -> list[tuple[int, str]]:
        """Put a copy in the place of a stand-in; its inputs go before ``first``."""
        layer, _, args, kwargs, seen, held = cast(Any, place.args[:6])
        tensors, rest, _ = cast(tuple[list[Node], list[Any], Any], _apart(args, kwargs))
        pairs = zip((*self.tensors, cast(Node, self.leave.args[1])), (*tensors, tensors[0]), strict=True)
        unlike = repr(tuple(rest)) != repr(self.enter.args[2]) or not all(_fits(a, b) for a, b in pairs)
        given = [(seen, self.seen), *zip(held, self.append.args[:3], strict=True)]
        if unlike or not all(isinstance(a, Node) if isinstance(b, Node) else a == b for a, b in given):
            raise UnlikeError(f"layers {self.enter.args[0]} and {layer} take different arguments")
        to: dict[Node, Any] = {n: tensors[cast(int, n.args[1])] for n in self.enter.users}
        to |= {b: a for a, b in given if isinstance(b, Node)}
        used = dict.fromkeys(m for n in self.before + self.behind for m in n.all_input_nodes if m in self.named)
        with graph.inserting_before(first):
            for node in used:
                to[node] = made = graph.placeholder(f"{node.name}_of_layer_{layer}")
                made.meta = dict(node.meta)
        depth = list(place.meta["nn_module_stack"].items())
        kept = [self.append, *sorted(self.append.users)]
        with graph.inserting_before(place):
            for n in (*self.before, *kept, *self.behind):
                if n not in to:
                    n.meta.setdefault(VERDICT, [])
                    to[n] = made = graph.node_copy(n, lambda m: to.get(m, m))
                    below = list(n.meta.get("nn_module_stack", {}).items())[len(depth) :]
                    made.meta["nn_module_stack"] = dict(depth + [(f"{key} {layer}", x) for key, x in below])
        parts: dict[Any, Node] = {n.args[1]: to[n] for n in self.append.users}
        for i, part in parts.items():  # as long as this layer's part of the cache
            part.meta["example_value"] = value(place)[i]
        to[self.append].meta["example_value"] = value(place)[:3]
        parts[3] = to[cast(Node, self.leave.args[1])]
        for item in list(place.users):
            item.replace_all_uses_with(parts[item.args[1]])
            graph.erase_node(item)
        graph.erase_node(place)
        return [(layer, self.named[node]) for node in used]


def _fits(a: Node, b: Node) -> bool:
    """Whether two tensors are of the same dtype and shape."""
    x, y = value(a), value(b)
    return x.dtype == y.dtype and x.dim() == y.dim() and all(map(same, x.shape, y.shape))
