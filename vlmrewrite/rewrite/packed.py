"""Linear maps whose weights are packed: in a trained copy of the layer, plain ones stand in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch.fx import Node

from vlmrewrite.analysis import Layer, needed, value, where
from vlmrewrite.plan import Branch
from vlmrewrite.rewrite.layer import LayerNodes


class PackedMap(NamedTuple):
    """Where a linear map stands in a captured layer: its path below the layer, what it takes and gives, its bias."""

    path: str
    given: Node
    out: Node
    biased: bool


def packed_maps(layer: Layer, parameters: Mapping[Node, str], block: str) -> tuple[list[PackedMap], list[PackedMap]]:
    """The maps of a layer whose weights are no numbers that can be trained: before its attention, and behind it.

    Args:
        layer: a captured one.
        parameters: the names, in the layer, of those of the graph's inputs that are its parameters.
        block: in the place of which they are found.

    Raises:
        ValueError: there is no parameter, or what a module left in the graph is not a map of one tensor to another.
    """
    if not parameters:
        raise ValueError(
            f"no parameter of layer {layer.index} was found among the graph's inputs, so that block"
            f" {block!r} cannot take their place"
        )
    names = {*parameters.values()}
    packed = [name.rpartition(".")[0] for n, name in parameters.items() if not value(n).dtype.is_floating_point]
    found = [_map(layer, path, f"{path}.bias" in names) for path in dict.fromkeys(packed)]
    order = {n: i for i, n in enumerate(layer.attention.graph.nodes)}
    found.sort(key=lambda one: order[one.out])
    late = [layer.attention in needed([one.out]) for one in found]
    early = [one for one, behind in zip(found, late, strict=True) if not behind]
    return early, [one for one, behind in zip(found, late, strict=True) if behind]


def unpacked(nodes: LayerNodes, branch: Branch, maps: Sequence[PackedMap]) -> None:
    """Let a branch's tokens go through the plain weights of its block, where its layer has packed ones."""
    for path, given, out, biased in maps:
        x = nodes.value(nodes.env[given], branch.tokens)
        kinds = ["weight", "bias"] if biased else ["weight"]
        weights = [nodes.emit.weight(f"{branch.block}.{path}.{kind}") for kind in kinds]
        nodes.instead(nodes.env[out], branch.tokens, nodes.emit.call(F.linear, x, *weights, on=branch.tokens))


def _map(layer: Layer, path: str, biased: bool) -> PackedMap:
    inside = {n for n in layer.region if _is_of(n, path)}
    given = {m for n in inside for m in n.all_input_nodes if m in layer.region | {layer.entry} and m not in inside}
    out = [n for n in inside if n.users.keys() - inside]
    if len(given) != 1 or len(out) != 1:
        raise ValueError(
            f"{path} of layer {layer.index} holds packed weights, and is no map of one tensor to another in the graph,"
            f" {where(next(iter(inside), layer.attention))}: expected one, for a trained copy of the layer"
        )
    return PackedMap(path, given.pop(), out[0], biased)


def _is_of(node: Node, path: str) -> bool:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return bool(stack) and str(stack[-1][0]).endswith(f".{path}")
