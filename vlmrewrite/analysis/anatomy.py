"""Anatomy: where the vision tokens live in a captured graph, found by structure alone.

The merge is where vision features enter a stream shaped [B, T, H]; the residual stream is the chain of dominators
from there to the logits; a decoder layer lies between the stream nodes that dominate one attention node and the next.
No module name is looked at.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, cast

import networkx as nx
import torch
import torch.fx
from torch import Tensor
from torch.fx import Node

from vlmrewrite.analysis.graph import needed, reachable, same, value, where
from vlmrewrite.ops import ATTENTION, KV_APPEND

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

    def scoring_flops(self, keys: int) -> int:
        """Matmul FLOPs of scoring one row's keys by one query token."""
        return 2 * self.heads * keys * self.head_size


@dataclass(frozen=True)
class Anatomy:
    """Read-only facts about a captured graph.

    Attributes:
        features: the vision features as they enter the graph, [F, C] or [I, N, C].
        merged_features: the features as they are written into the stream, same tokens.
        merge: the node that writes them, [B, T, H].
        vision: the vision-token mask, bool [B, T].
        layers: the decoder layers in order.
        length: the symbolic (or constant) size of the token axis.
        batch: the size of the batch axis.
        dtype: of the stream.
        logits: which of the graph's outputs holds the logits (or the last hidden state).
    """

    features: Node
    merged_features: Node
    merge: Node
    vision: Node
    layers: tuple[Layer, ...]
    length: object
    batch: object
    hidden: int
    dtype: torch.dtype
    logits: int

    @property
    def exit(self) -> Node:
        """The residual stream after the last layer."""
        return self.layers[-1].exit


def analyse(gm: torch.fx.GraphModule) -> Anatomy:
    """Find the merge, the residual stream and the layers of a captured forward.

    Raises:
        ValueError: a part could not be recognised; the message names it, with the node and its source line.
    """
    attentions = [n for n in gm.graph.nodes if n.target is ATTENTION]
    if not attentions:
        raise ValueError("no attention node was captured; expected one per decoder layer")
    features = _features(gm)
    output = next(iter(reversed(gm.graph.nodes)))
    merge = _merge(features, output, attentions)
    stream = value(merge)
    assert isinstance(stream, Tensor)
    batch: Any
    length: Any
    batch, length, hidden = stream.shape
    if not isinstance(length, torch.SymInt):
        raise ValueError(f"the token axis was specialised to {length} in the graph at {where(merge)}")
    vision, merged = _vision(merge, features, batch, length)
    after = reachable([merge])
    logits = _logits(output, attentions, after, length)
    chain = _dominators(merge, logits, after)
    layers = _layers(chain, attentions, merge, after, length)
    outputs = output.args[0]
    at = next(i for i, n in enumerate(outputs) if n is logits) if isinstance(outputs, (list, tuple)) else 0
    return Anatomy(features, merged, merge, vision, layers, length, batch, int(hidden), stream.dtype, at)


def _features(gm: torch.fx.GraphModule) -> Node:
    found = [n for n in gm.graph.nodes if n.op == "placeholder" and n.name == "l_features_"]
    if len(found) != 1:
        raise ValueError(f"{len(found)} vision feature inputs in the graph; expected 1: is there an image in the call?")
    return cast(Node, found[0])


def _merge(features: Node, output: Node, attentions: list[Node]) -> Node:
    """The first [B, T, H] node, dominating every attention node, that the features flow through."""
    after = reachable([features])
    if attentions[0] not in after:
        raise ValueError(f"the first attention node does not depend on the vision features: {where(attentions[0])}")
    graph = nx.DiGraph((a, b) for b in after for a in b.all_input_nodes if a in after)
    above = nx.immediate_dominators(graph, features)
    chain = [attentions[0]]
    while chain[-1] is not features:
        chain.append(above[chain[-1]])
    before = needed([attentions[0]])
    for node in reversed(chain[:-1]):
        x = value(node)
        joins = any(n not in after and isinstance(value(n), Tensor) for n in node.all_input_nodes)
        if isinstance(x, Tensor) and x.dim() == 3 and joins and node in before:
            return node
    raise ValueError(f"found no node that writes the vision features ({where(features)}) into a [B, T, H] stream")


def _vision(merge: Node, features: Node, batch: object, length: object) -> tuple[Node, Node]:
    """The bool [B, T] vision mask behind the merge, and the features as the merge takes them."""
    after = reachable([features])
    merged = next(n for n in merge.all_input_nodes if n in after)
    queue = [n for n in merge.all_input_nodes if n not in after]
    while queue:
        node = queue.pop(0)
        x = value(node)
        if isinstance(x, Tensor) and x.dtype == torch.bool:
            if x.dim() == 2 and same(x.shape[1], length):
                return node, merged
            queue.extend(node.all_input_nodes)
    raise ValueError(f"found no bool [B, T] vision mask behind the merge, {where(merge)}")


def _logits(output: Node, attentions: list[Node], after: set[Node], length: object) -> Node:
    """The output that depends on the last attention node, other than the cache: the logits, or the hidden state."""
    last = reachable([attentions[-1]])
    caches = set()
    for n in output.all_input_nodes:
        if n.target is operator.getitem and isinstance(n.args[0], Node) and n.args[0].target is KV_APPEND:
            caches.add(n)
    found = [n for n in output.all_input_nodes if n in last and n not in caches]
    if not found:
        raise ValueError("no output of the graph depends on the last attention node; expected logits or hidden states")
    return found[-1]


def _dominators(merge: Node, logits: Node, after: set[Node]) -> list[Node]:
    """Nodes that every path from the merge to the logits goes through, in order."""
    between = after & needed([logits])
    graph = nx.DiGraph((a, b) for b in between for a in b.all_input_nodes if a in between)
    above = nx.immediate_dominators(graph, merge)
    chain = [logits]
    while chain[-1] is not merge:
        chain.append(above[chain[-1]])
    return chain[::-1]


def _layers(
    chain: list[Node], attentions: list[Node], merge: Node, after: set[Node], length: object
) -> tuple[Layer, ...]:
    depth = {n: i for i, n in enumerate(chain)}
    entries = []
    graph = nx.DiGraph((a, b) for b in after for a in b.all_input_nodes if a in after)
    above = nx.immediate_dominators(graph, merge)
    for node in attentions:
        at = node
        while at not in depth:
            at = above[at]
        entries.append(at)
    adds = [n for n in chain if n.target in _ADDS and sum(i in after for i in n.all_input_nodes) == 2]
    if not adds or depth[adds[-1]] <= depth[entries[-1]]:
        raise ValueError(f"found no residual add after the last attention node, {where(attentions[-1])}")
    out = []
    for i, node in enumerate(attentions):
        end = entries[i + 1] if i + 1 < len(entries) else adds[-1]
        if depth[end] <= depth[entries[i]]:
            raise ValueError(
                f"attention nodes {i} and {i + 1} hang on the same point of the residual stream, {where(entries[i])}:"
                " parallel decoder streams are not recognised"
            )
        behind = reachable([node])
        inner = [n for n in adds if depth[entries[i]] < depth[n] < depth[end] and n in behind]
        out.append(_layer(i, entries[i], end, inner[0] if inner else None, node, length))
    return tuple(out)


def _layer(index: int, entry: Node, exit: Node, middle: Node | None, attention: Node, length: object) -> Layer:
    q, k, v = (attention.args[i] for i in range(3))
    assert isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)
    append = k.args[0] if k.target is operator.getitem and isinstance(k.args[0], Node) else None
    append = append if append is not None and append.target is KV_APPEND else None
    region = reachable([entry]) & needed([exit, *([append] if append is not None else [])], {entry})
    if attention not in region:
        raise ValueError(f"layer {index}: the attention node is not between {where(entry)} and {where(exit)}")
    new_k, new_v = (append.args[3], append.args[4]) if append is not None else (k, v)
    assert isinstance(new_k, Node) and isinstance(new_v, Node)
    q_slice = needed([q], {entry}) & region
    k_slice, v_slice = (needed([x], {entry}) & region for x in (new_k, new_v))
    qx, kx, vx = value(q), value(new_k), value(new_v)
    assert isinstance(qx, Tensor) and isinstance(kx, Tensor) and isinstance(vx, Tensor)
    return Layer(
        index=index,
        entry=entry,
        exit=exit,
        attention=attention,
        append=append,
        middle=middle,
        region=frozenset(region),
        heads=int(qx.shape[1]),
        kv_heads=int(kx.shape[1]),
        head_size=int(qx.shape[-1]),
        value_size=int(vx.shape[-1]),
        queries=_linear_maps(q_slice),
        keys=_linear_maps(k_slice),
        values=_linear_maps(v_slice),
        behind=_linear_maps(region - q_slice - k_slice - v_slice),
        kv_bytes=int(kx.shape[1]) * (int(qx.shape[-1]) + int(vx.shape[-1])) * kx.element_size(),
    )


def _linear_maps(nodes: set[Node]) -> dict[Node, int]:
    """The linear maps among the nodes, with their matmul FLOPs per token."""
    found = {}
    for n in nodes:
        if n.target in (torch.nn.functional.linear, torch._C._nn.linear, torch.matmul, operator.matmul, "matmul"):
            weight = value(n.args[1]) if isinstance(n.args[1], Node) else None
            if isinstance(weight, Tensor) and weight.dim() == 2:
                found[n] = 2 * int(weight.shape[0]) * int(weight.shape[1])
    return found
