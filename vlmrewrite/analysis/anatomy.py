"""Anatomy: where the vision tokens live in a captured graph, found by structure alone; and what its layers cost.

A merge is where vision features enter a stream shaped [B, T, H]; the residual stream is the chain of dominators from
there to the logits; a decoder layer lies between the stream nodes that dominate one attention node and the next.
No module name is looked at.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import networkx as nx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vlmrewrite.analysis.graph import needed, reachable, same, value, where
from vlmrewrite.analysis.operators import LINEAR, MATMULS, is_number
from vlmrewrite.ops import ATTENTION, KV_APPEND
from vlmrewrite.plan import Last, Plan, TokenCounts, TokenSet

_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        entry, exit: residual stream before and after, [B, T, H].
        attention: its ``vlm::attention`` node; its arguments q, k, v.
        append: its ``vlm::kv_append`` node, or None without a cache.
        middle: residual stream between the attention half and the MLP half, or None where they are parallel.
        heads, kv_heads, head_size, value_size: of the attention.
        queries, keys, values, behind: the linear maps that these need, and those that follow the attention, with
            their matmul FLOPs per token. A fused projection stands in several of them.
        kv_bytes: cache bytes per token.
    """

    index: int
    entry: Node
    exit: Node
    attention: Node
    append: Node | None
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

    def second_half(self) -> frozenset[Node]:
        """The nodes between ``middle`` and ``exit``."""
        assert self.middle is not None
        return frozenset((reachable([self.middle]) & needed([self.exit], {self.middle})) & self.region)

    def attention_flops(self, queries: int, keys: int) -> int:
        """Matmul FLOPs of one row's attention."""
        return 2 * self.heads * queries * keys * (self.head_size + self.value_size)


@dataclass(frozen=True)
class Merge:
    """Where vision features, of images or of videos, enter the stream.

    Attributes:
        modality: ``"image"`` or ``"video"``.
        name: of the features in the vision tower's output.
        features: the features as they enter the graph, [F, C] or [I, N, C].
        merged: the features as they are written into the stream, same tokens.
        node: what writes them, [B, T, H].
        mask: where, bool [B, T].
    """

    modality: str
    name: str
    features: Node
    merged: Node
    node: Node
    mask: Node


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
    """

    merges: tuple[Merge, ...]
    layers: tuple[Layer, ...]
    length: object
    batch: object
    hidden: int
    dtype: torch.dtype
    logits: int


def analyse(gm: GraphModule, features: Mapping[str, Mapping[str, int]]) -> Anatomy:
    """Find the merges, the residual stream and the layers of a captured forward.

    Args:
        gm: the captured graph.
        features: for images and videos, if there are any, by name which of its inputs may be the vision features. Those
            that reach the first attention are.

    Raises:
        ValueError: a part could not be recognised; the message names it, with the node and its source line.
    """
    attentions = [n for n in gm.graph.nodes if n.target is ATTENTION]
    if not attentions:
        raise ValueError("no attention node was captured; expected one per decoder layer")
    inputs = gm.graph.find_nodes(op="placeholder")
    found = [_merge(modality, {n: inputs[at] for n, at in named.items()}, attentions[0])
             for modality, named in features.items()]  # fmt: skip
    merges = tuple(sorted(found, key=lambda merge: merge.node))
    stream = value(merges[-1].node)
    batch, length, hidden = stream.shape
    outputs: Any = gm.graph.output_node().args[0]
    logits = _logits(outputs, attentions[-1])
    layers = _layers(merges[-1].node, outputs[logits], attentions)
    return Anatomy(merges, layers, length, batch, int(hidden), stream.dtype, logits)


def _merge(modality: str, named: Mapping[str, Node], attention: Node) -> Merge:
    """The first [B, T, H] node, dominating the first attention node, that joins the features to other tensors."""
    name = next((name for name, n in named.items() if attention in reachable([n])), None)
    if name is None:
        raise ValueError(f"the first attention node does not depend on the vision features: {where(attention)}")
    seeing = reachable([features := named[name]])
    for node in nx.shortest_path(_dominators(features, seeing), features, attention)[1:]:
        x = value(node)
        joins = any(n not in seeing and isinstance(value(n), Tensor) for n in node.all_input_nodes)
        if isinstance(x, Tensor) and x.dim() == 3 and joins:
            length: object = x.shape[1]
            if not isinstance(length, torch.SymInt):
                raise ValueError(f"the token axis was specialised to {length} in the graph at {where(node)}")
            merged = next(n for n in node.all_input_nodes if n in seeing)
            return Merge(modality, name, features, merged, node, _vision(node, seeing, length))
    raise ValueError(f"found no node that writes the vision features ({where(features)}) into a [B, T, H] stream")


def _vision(merge: Node, seeing: set[Node], length: object) -> Node:
    """The bool [B, T] vision mask behind the merge, the nearest one that the features do not flow through."""
    inputs = [n for n in merge.all_input_nodes if n not in seeing]
    masks = [n for n in inputs if isinstance(x := value(n), Tensor) and x.dtype == torch.bool]
    queue = masks or inputs  # behind the stream, there may be the mask of another merge
    for node in queue:
        x = value(node)
        if isinstance(x, Tensor) and x.dtype == torch.bool:
            if x.dim() == 2 and same(x.shape[1], length):
                return node
            queue += node.all_input_nodes
    raise ValueError(f"found no bool [B, T] vision mask behind the merge, {where(merge)}")


def _logits(outputs: Sequence[Any], attention: Node) -> int:
    """The output that depends on the last attention node, other than the cache: the logits, or the hidden state."""
    after = reachable([attention])
    found = [i for i, n in enumerate(outputs) if n in after and _append(n) is None]
    if not found:
        raise ValueError("no output of the graph depends on the last attention node; expected logits or hidden states")
    return found[-1]


def _append(node: Node) -> Node | None:
    """The ``vlm::kv_append`` node that a node is a result of, or None."""
    source = node.args[0] if node.target is operator.getitem else None
    return source if isinstance(source, Node) and source.target is KV_APPEND else None


def _dominators(start: Node, after: set[Node]) -> nx.DiGraph[Node]:
    """A tree of the nodes that depend on ``start``: every path from it to a node goes through those above the node.

    Sizes are no path: they tell nothing of the values.
    """
    graph = nx.DiGraph((a, b) for b in after for a in b.all_input_nodes if a in after and not is_number(a))
    return nx.DiGraph((above, n) for n, above in nx.immediate_dominators(graph, start).items() if n is not start)


def _layers(merge: Node, logits: Node, attentions: list[Node]) -> tuple[Layer, ...]:
    after = reachable([merge])
    tree = _dominators(merge, after)
    stream = nx.shortest_path(tree, merge, logits)
    depth = {n: i for i, n in enumerate(stream)}
    starts = [max(depth.get(n, 0) for n in nx.shortest_path(tree, merge, attention)) for attention in attentions]
    whole = [i for i, n in enumerate(stream) if isinstance(x := value(n), Tensor) and x.dim() == 3]
    adds = [next(k for k in whole if k >= i) for i, n in enumerate(stream)
            if n.target in _ADDS and sum(x in after for x in n.all_input_nodes) == 2]  # fmt: skip
    if not adds or adds[-1] <= starts[-1]:
        raise ValueError(f"found no residual add after the last attention node, {where(attentions[-1])}")
    layers = []
    for i, (start, end) in enumerate(pairwise([*starts, adds[-1]])):
        if end <= start:
            raise ValueError(f"attention nodes {i} and {i + 1} both hang on {where(stream[start])}; expected a chain")
        behind = reachable([attentions[i]])
        middle = next((stream[k] for k in adds if start < k < end and stream[k] in behind), None)
        layers.append(_layer(i, stream[start], stream[end], middle, attentions[i]))
    return tuple(layers)


def _layer(index: int, entry: Node, exit: Node, middle: Node | None, attention: Node) -> Layer:
    q, k, v = cast(tuple[Node, Node, Node], attention.args[:3])
    append = _append(k)
    if append is not None:
        k, v = cast(tuple[Node, Node], append.args[3:5])
    region = reachable([entry]) & needed([exit, *([] if append is None else [append])], {entry})
    if attention not in region:
        raise ValueError(f"layer {index}: the attention node is not between {where(entry)} and {where(exit)}")
    before = [needed([n], {entry}) & region for n in (q, k, v)]
    queries, keys, values = (_linear_maps(nodes) for nodes in before)
    behind = _linear_maps(region.difference(*before))
    heads, kv_heads = (int(value(n).shape[1]) for n in (q, k))
    head_size, value_size = (int(value(n).shape[-1]) for n in (q, v))
    kv_bytes = kv_heads * (head_size + value_size) * value(k).element_size()
    return Layer(index, entry, exit, attention, append, middle, frozenset(region), heads, kv_heads, head_size,
                 value_size, queries, keys, values, behind, kv_bytes)  # fmt: skip


def _linear_maps(nodes: set[Node]) -> dict[Node, int]:
    """The linear maps among the nodes, with their matmul FLOPs per token."""
    weights = {n: value(n.args[1]) for n in nodes if n.target in LINEAR | MATMULS and isinstance(n.args[1], Node)}
    return {n: 2 * int(w.numel()) for n, w in weights.items() if isinstance(w, Tensor) and w.dim() == 2}


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs in one call, all rows together.

    ``run`` and ``keys`` are the lengths, a row, of what it computes on and of what it adds to the cache.
    """

    index: int
    run: int
    keys: int
    flops: int
    kv_bytes: int


def costs(
    anatomy: Anatomy, plan: Plan, counts: TokenCounts, past: int = 0, held: Sequence[int] = ()
) -> list[LayerCost]:
    """Tokens, matmul FLOPs and K/V bytes of each layer under a plan.

    A layer's FLOPs are those of its linear maps, once for each token set that they are computed for (a fused q, k and v
    projection twice, where a layer runs on another set than it attends to), of its attention over all pairs, of scoring
    vision tokens at its entry, and of a branch's block that leaves there. What an operator of a policy or an edit does
    inside is not known here and not counted.

    Args:
        anatomy: of the model.
        plan: what each layer does.
        counts: of the call.
        past: logical length of the cache before the call.
        held: keys that each layer held before the call; without it, all of ``past``.
    """
    batch, out = len(counts.text), []
    for layer, entry in zip(anatomy.layers, plan.layers, strict=True):
        before = held[layer.index] if held else past
        run, keys, mlp = entry.sets()
        maps: dict[TokenSet, dict[Node, int]] = defaultdict(dict)
        half = layer.second_half() if mlp != run else frozenset()
        maps[run] |= layer.queries | {n: f for n, f in layer.behind.items() if n not in half}
        maps[mlp] |= {n: f for n, f in layer.behind.items() if n in half}
        maps[keys] |= layer.keys | layer.values
        added = counts.size(keys)
        flops = layer.attention_flops(counts.size(run), added + before)
        for scored in plan.scored(layer.index):
            maps[Last] |= layer.queries
            maps[scored] |= layer.keys
            flops += 2 * layer.heads * layer.head_size * (counts.size(scored) + before)
        flops += sum(counts.size(s) * sum(found.values()) for s, found in maps.items())
        blocks = [b for b in plan.branches if b.leave == layer.index and b.block is not None]
        flops += sum(_block_flops(anatomy.layers[b.layer], counts.size(b.tokens)) for b in blocks)
        out.append(LayerCost(layer.index, counts.size(run), added, batch * flops, batch * added * layer.kv_bytes))
    return out


def _block_flops(layer: Layer, tokens: int) -> int:
    maps = layer.queries | layer.keys | layer.values | layer.behind
    return tokens * sum(maps.values()) + layer.attention_flops(tokens, tokens)
