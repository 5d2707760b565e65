"""Where vision features enter the stream of a captured graph, found by structure alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vlmrewrite.analysis.graph import dominators, reachable, same, value, where
from vlmrewrite.analysis.operators import PICKS, set_item, takes_channels


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
        picks: what takes some of the features before they are written, one behind the other; mostly nothing.
    """

    modality: str
    name: str
    features: Node
    merged: Node
    node: Node
    mask: Node
    picks: tuple[Node, ...] = ()


def merges_of(gm: GraphModule, features: Mapping[str, Mapping[str, int]], attention: Node) -> tuple[Merge, ...]:
    """The merges of images and videos, in the order in which they happen.

    Args:
        gm, features: as for :func:`vlmrewrite.analysis.analyse`.
        attention: the first attention node.

    Raises:
        ValueError: one could not be recognised.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    named = {modality: {name: inputs[at] for name, at in each.items()} for modality, each in features.items()}
    found = [_merge(modality, each, attention) for modality, each in named.items()]
    return tuple(sorted(found, key=lambda merge: merge.node))


def _merge(modality: str, named: Mapping[str, Node], attention: Node) -> Merge:
    """The first [B, T, H] node, dominating the first attention node, that joins the features to other tensors."""
    name = next((name for name, n in named.items() if attention in reachable([n])), None)
    if name is None:
        raise ValueError(f"the first attention node does not depend on the vision features: {where(attention)}")
    seeing, picks = reachable([features := named[name]]), list[Node]()
    for node in nx.shortest_path(dominators(features, seeing), features, attention)[1:]:
        x = value(node)
        joins = any(n not in seeing and isinstance(value(n), Tensor) for n in node.all_input_nodes)
        if joins and node.target in PICKS:
            of = node.all_input_nodes[0]
            picks += [node] * (of in seeing and x.dim() <= value(of).dim() and not takes_channels(node))
        elif isinstance(x, Tensor) and x.dim() == 3 and joins:
            length: object = x.shape[1]
            if not isinstance(length, torch.SymInt):
                raise ValueError(f"the token axis was specialised to {length} in the graph at {where(node)}")
            merged = next(n for n in node.all_input_nodes if n in seeing)
            return Merge(modality, name, features, merged, node, _vision(node, seeing, length), tuple(picks))
    raise ValueError(f"found no node that writes the vision features ({where(features)}) into a [B, T, H] stream")


def _vision(merge: Node, seeing: set[Node], length: object) -> Node:
    """The bool [B, T] vision mask behind the merge, the nearest one that the features do not flow through."""
    queue = [n for n in merge.all_input_nodes if n not in seeing]
    for node in queue:
        x = value(node)
        if isinstance(x, Tensor) and x.dtype == torch.bool:
            if x.dim() == 2 and (same(x.shape[1], length) or merge.target is set_item):
                return node
            queue += node.all_input_nodes
    raise ValueError(f"found no bool [B, T] vision mask behind the merge, {where(merge)}")
