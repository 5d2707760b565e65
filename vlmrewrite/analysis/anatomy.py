"""Anatomy: where the vision tokens live in a captured graph, found by structure alone.

A merge is where vision features enter a stream shaped [B, T, H]. A decoder layer is the outermost module that calls
one attention and no other, and the stream is what enters and leaves it; where the graph does not tell modules apart,
a layer lies between the dominators, on the way from the last merge to the logits, of one attention and the next.
No module name is looked at.
"""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import networkx as nx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vlmrewrite.analysis.graph import closure, dominators, is_number, needed, reachable, same, value, where
from vlmrewrite.analysis.merge import Merge, merges_of
from vlmrewrite.analysis.operators import LINEAR, MATMULS
from vlmrewrite.ops import (
    ATTENTION,
    EXPERT_LINEAR,
    FEEDFORWARD,
    INDEX_KEYS,
    INDEXED,
    KV_APPEND,
    RECURRENT,
    flops_of_indexed,
)

_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        entry, exit: residual stream before and after, [B, T, H].
        attention: its ``vlm::attention`` node; its arguments q, k, v. For a layer with an index over its keys:
            ``vlm::indexed``. For a layer without keys: ``vlm::recurrent``.
        append: the ``vlm::kv_append`` node behind its keys, or None without a cache, and for a layer without keys. What
            is held are the keys and values, or what they are made of.
        owner: the layer that computes the keys and values that it attends to, itself or an earlier one.
        middle: residual stream between the attention half and the MLP half, or None where it has not two such halves.
        heads, kv_heads, head_size, value_size: of the attention; 0 for a layer without keys.
        queries, keys, values, behind: the linear maps that these need, and those that follow the attention, with
            their matmul FLOPs per token. A fused projection stands in several of them.
        kv_bytes: cache bytes per token; 0 for a layer that attends to another one's keys.
    """

    index: int
    entry: Node
    exit: Node
    attention: Node
    append: Node | None
    owner: int
    middle: Node | None
    region: frozenset[Node]
    heads: int
    kv_heads: int
    head_size: int
    value_size: int
    queries: dict[Node, int]
    keys: dict[Node, int]
    values: dict[Node, int]
    behind: dict[Node, int]
    kv_bytes: int

    @property
    def kind(self) -> str:
        """How its tokens meet: "attention"; "indexed", attention to keys that an index selects; "recurrent"; or not.

        In a recurrent layer a state passes through them in order; in one that is "feed-forward" none meets another.
        """
        if self.attention.target is RECURRENT:
            return "feed-forward" if self.attention.args[4] == FEEDFORWARD else "recurrent"
        return "indexed" if self.attention.target is INDEXED else "attention"

    @property
    def keyless(self) -> bool:
        """Whether it keeps no keys."""
        return self.attention.target is RECURRENT

    def second_half(self) -> frozenset[Node]:
        """The nodes between ``middle`` and ``exit``."""
        assert self.middle is not None
        return frozenset((reachable([self.middle]) & needed([self.exit], {self.middle})) & self.region)

    def attention_flops(self, queries: int, keys: int) -> int:
        """Matmul FLOPs of one row's attention."""
        return 2 * self.heads * queries * keys * (self.head_size + self.value_size)


@dataclass(frozen=True)
class Anatomy:
    """Read-only facts about a captured graph.

    Attributes:
        merges: those of images and videos, in the order in which they happen.
        layers: the decoder layers in order.
        length: the symbolic (or constant) size of the token axis.
        batch: the size of the batch axis.
        dtype: of the stream.
        logits: which of the graph's outputs holds the logits (or the last hidden state).
        states: how many hidden states a token has, on an axis in front of the batch; 0: one, and no such axis.
    """

    merges: tuple[Merge, ...]
    layers: tuple[Layer, ...]
    length: object
    batch: object
    hidden: int
    dtype: torch.dtype
    logits: int
    states: int = 0

    @functools.cached_property
    def between(self) -> dict[int, frozenset[Node]]:
        """By layer, what stands between the one before and it, with that one's exit; none where nothing does."""
        return {
            b.index: frozenset(reachable([a.exit]) & needed([b.entry], {a.exit}))
            for a, b in pairwise(self.layers)
            if a.exit is not b.entry
        }


def analyse(gm: GraphModule, features: Mapping[str, Mapping[str, int]]) -> Anatomy:
    """Find the merges, the residual stream and the layers of a captured forward.

    Args:
        gm: the captured graph.
        features: for images and videos, if there are any, by name which of its inputs may be the vision features. Those
            that reach the first attention are.

    Raises:
        ValueError: a part could not be recognised; the message names it, with the node and its source line.
    """
    attentions = [n for n in gm.graph.nodes if n.target in (ATTENTION, INDEXED, RECURRENT)]
    if all(n.target is RECURRENT for n in attentions):
        raise ValueError("no attention node was captured; expected one per decoder layer")
    merges = merges_of(gm, features, attentions[0])
    stream = value(merges[-1].node)
    batch, length, hidden = stream.shape
    outputs: Any = gm.graph.output_node().args[0]
    logits = _logits(outputs, attentions[-1])
    layers = _layers(merges[-1].node, outputs[logits], attentions)
    entering = value(layers[0].entry)
    states = int(entering.shape[0]) if entering.dim() == 4 else 0
    return Anatomy(merges, layers, length, batch, int(hidden), stream.dtype, logits, states)


def _logits(outputs: Sequence[Any], attention: Node) -> int:
    """The output that depends on the last attention node, other than the cache: the logits, or the hidden state."""
    after = reachable([attention])
    found = [i for i, n in enumerate(outputs) if n in after and cache_of(n) is None]
    if not found:
        raise ValueError("no output of the graph depends on the last attention node; expected logits or hidden states")
    return found[-1]


def cache_of(node: Node) -> Node | None:
    """The ``vlm::kv_append`` or ``vlm::recurrent`` node that a node is a result of, or None."""
    source = node.args[0] if node.target is operator.getitem else None
    return source if isinstance(source, Node) and source.target in (KV_APPEND, RECURRENT) else None


def append_of(k: Node) -> Node | None:
    """The ``vlm::kv_append`` node that an attention's keys are the result of, or are made of; or None."""
    found = closure([k], lambda n: () if n.target is KV_APPEND or is_number(n) else n.all_input_nodes)
    appends = [n for n in found if n.target is KV_APPEND]
    return appends[0] if len(appends) == 1 else None


def _layers(merge: Node, logits: Node, attentions: list[Node]) -> tuple[Layer, ...]:
    after = reachable([merge])
    found = _modules(merge, logits, after, attentions) or _chain(merge, logits, after, attentions)
    keys = [n if n.target is RECURRENT else n.args[1] for n in attentions]
    return tuple(_layer(i, keys.index(keys[i]), attentions[i], *bounds) for i, bounds in enumerate(found))


def _modules(
    merge: Node, logits: Node, after: set[Node], attentions: list[Node]
) -> list[tuple[Node, Node, set[Node]]] | None:
    """Of each attention's own module: the stream before and behind it, and its nodes; None if that is not clear."""
    if len(attentions) == 1:
        return None  # every module around it calls no other
    stacks = [list(n.meta.get("nn_module_stack", ())) for n in (*attentions, merge)]
    taken = Counter(key for stack in stacks for key in stack)
    homes = [next((key for key in stack if taken[key] == 1), None) for stack in stacks[:-1]]
    inside, which = [set[Node]() for _ in homes], {home: i for i, home in enumerate(homes) if home is not None}
    for n in after:
        for key in n.meta.get("nn_module_stack", {}).keys() & which.keys():
            inside[which[key]].add(n)
    entries: list[Node] = []
    for nodes, attention in zip(inside, attentions, strict=True):
        queries = needed([cast(Node, attention.args[0])], after - nodes)
        entering = [n for n in queries & (after - nodes) if _like(n, merge)]
        if len(entering) != 1:
            return None
        entries += entering
    exits = []
    for nodes, attention, then in zip(inside, attentions, [*entries[1:], logits], strict=True):
        read = needed([then], nodes) & nodes & reachable([attention])
        leaving = [n for n in read if _like(n, merge) and (n is then or n.users.keys() - nodes)]
        if len(leaving) != 1:
            return None
        exits += leaving
    return list(zip(entries, exits, inside, strict=True))


def _like(node: Node, stream: Node) -> bool:
    """Whether a node holds a hidden state of each token, or several, on an axis in front of the batch."""
    x = value(node)
    return isinstance(x, Tensor) and x.dim() in (3, 4) and all(map(same, x.shape[-3:], value(stream).shape))


def _chain(merge: Node, logits: Node, after: set[Node], attentions: list[Node]) -> list[tuple[Node, Node, set[Node]]]:
    """What :func:`_modules` finds, by dominators."""
    tree = dominators(merge, after)
    stream = nx.shortest_path(tree, merge, logits)
    depth = {n: i for i, n in enumerate(stream)}
    queries = [cast(Node, attention.args[0]) for attention in attentions]
    starts = [max(depth.get(n, 0) for n in nx.shortest_path(tree, merge, q)) for q in queries]
    adds = [i for i, n in enumerate(stream) if _joins(n, after)]
    if not adds or adds[-1] <= starts[-1]:
        raise ValueError(f"found no residual add after the last attention node, {where(attentions[-1])}")
    for i, (start, end) in enumerate(pairwise([*starts, adds[-1]])):
        if end <= start:
            raise ValueError(f"attention nodes {i} and {i + 1} both hang on {where(stream[start])}; expected a chain")
    return [(stream[i], stream[k], after) for i, k in pairwise([*starts, adds[-1]])]


def _joins(node: Node, nodes: set[Node] | frozenset[Node]) -> bool:
    """Whether a node adds two of some nodes."""
    return node.target in _ADDS and sum(x in nodes for x in node.all_input_nodes) == 2


def _layer(index: int, owner: int, attention: Node, entry: Node, exit: Node, inside: set[Node]) -> Layer:
    if attention.target is RECURRENT:
        region = reachable([entry]) & needed([exit], {entry}) & (inside | {entry})
        weights: Any = attention.args[3]
        maps = _linear_maps(region) | {attention: sum(2 * int(value(w).numel()) for w in weights if value(w).dim() > 1)}
        middle = _middle(attention, entry, exit, region)
        return Layer(
            index, entry, exit, attention, None, owner, middle, frozenset(region), 0, 0, 0, 0, {}, {}, {}, maps, 0
        )
    q, k, v = cast(tuple[Node, Node, Node], attention.args[:3])
    append, direct = append_of(k), cache_of(k) is not None
    if owner != index and append is not None and not direct:
        raise ValueError(
            f"layer {index} attends to what layer {owner} made of the keys that it holds: expected a layer that attends"
            " to keys as they are held, or makes its own"
        )
    held = (k, v) if append is None else cast(tuple[Node, Node], append.args[3:5])
    region = reachable([entry]) & needed([exit, *([] if append is None else [append])], {entry}) & (inside | {entry})
    if attention not in region:
        raise ValueError(f"layer {index}: the attention node is not between {where(entry)} and {where(exit)}")
    middle = _middle(attention, entry, exit, region)
    before = [needed([n], {entry}) & region for n in (q, *(held if direct else (k, v)))]
    queries, keys, values = (_linear_maps(nodes) for nodes in before)
    behind = _linear_maps(region.difference(*before))
    heads, kv_heads = (int(value(n).shape[1]) for n in (q, k))
    head_size, value_size = (int(value(n).shape[-1]) for n in (q, v))
    if attention.target is INDEXED:
        made = next(n for n in before[1] if n.target is INDEX_KEYS)
        keys[made], behind[attention], pair = flops_of_indexed(attention.args, [*map(value, attention.args[-2])])  # type: ignore[arg-type]
        heads, head_size, value_size = 1, pair // 2, 0
    kv_bytes = sum(int(x.shape[1] * x.shape[-1]) * x.element_size() for x in map(value, held)) * (owner == index)
    return Layer(index, entry, exit, attention, append, owner, middle, frozenset(region), heads, kv_heads,
                 head_size, value_size, queries, keys, values, behind, kv_bytes)  # fmt: skip


def _middle(attention: Node, entry: Node, exit: Node, region: set[Node]) -> Node | None:
    """The residual stream between the two halves of a layer, or None if it has not two."""
    stream = nx.shortest_path(dominators(entry, region), entry, exit)
    adds = [n for n in stream if _joins(n, region) and attention in needed([n], {entry})]
    return adds[0] if len(adds) == 2 and adds[1] is exit else None


def _linear_maps(nodes: set[Node]) -> dict[Node, int]:
    """The linear maps among the nodes, with their matmul FLOPs per token."""
    weights = {n: value(n.args[1]) for n in nodes if n.target in LINEAR | MATMULS and isinstance(n.args[1], Node)}
    found = {n: 2 * int(w.numel()) for n, w in weights.items() if isinstance(w, Tensor) and w.dim() == 2}
    for n in (n for n in nodes if n.target is EXPERT_LINEAR):
        experts, weight = (value(x) for x in cast(tuple[Node, Node], n.args[1:3]))
        found[n] = 2 * int(experts.shape[1]) * int(weight[0].numel())
    return found
