"""Linear maps whose weights are packed, or that are made of several: plain ones take their place in a trained copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import nn
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


def packed_maps(
    layer: Layer, parameters: Mapping[Node, str], name: str, block: nn.Module
) -> tuple[list[PackedMap], list[PackedMap], dict[Node, str]]:
    """The maps of a layer whose weights are no numbers that can be trained, and the layer's other parameters.

    Args:
        layer: a captured one.
        parameters: the names, in the layer, of those of the graph's inputs that are its parameters.
        name, block: what takes their place.

    Returns:
        maps before the attention, maps behind it, and the rest of ``parameters``.

    Raises:
        ValueError: there is no parameter, or what a module left in the graph is not a map of one tensor to another.
    """
    if not parameters:
        raise ValueError(
            f"no parameter of layer {layer.index} was found among the graph's inputs, so that block"
            f" {name!r} cannot take their place"
        )
    names = {*parameters.values()}
    plain = dict(block.named_parameters())
    other = [known for n, known in parameters.items() if not value(n).dtype.is_floating_point] + [*plain.keys() - names]
    paths = dict.fromkeys(known.rpartition(".")[0] for known in other)
    outer = [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
    used = [path for path in outer if any(_is_of(n, path) for n in layer.region)]
    found = [_map(layer, path, f"{path}.bias" in plain) for path in used]
    order = {n: i for i, n in enumerate(layer.attention.graph.nodes)}
    found.sort(key=lambda one: order[one.out])
    behind = {one.path for one in found if layer.attention in needed([one.out])}
    early, late = ([one for one in found if (one.path in behind) is which] for which in (False, True))
    inside = tuple(f"{path}." for path in used)
    return early, late, {n: known for n, known in parameters.items() if not known.startswith(inside)}


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
            f" {where(next(iter(inside)))}: expected one, for a trained copy of the layer"
        )
    return PackedMap(path, given.pop(), out[0], biased)


def _is_of(node: Node, path: str) -> bool:
    stack = (node.meta.get("nn_module_stack") or {}).values()
    return any(str(entry[0]).endswith(f".{path}") for entry in stack)
