"""Compiled decode steps that write into the rooms of a cache, where they would return a longer copy of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor

from vlmrewrite import dialect
from vlmrewrite.cache import PositionCache


def kv_write(
    keys: Tensor, values: Tensor, positions: Tensor, k: Tensor, v: Tensor, pos: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`vlmrewrite.dialect.kv_append` does, for a :class:`vlmrewrite.room.Room`, and in it.

    Args:
        keys: [B, Hk, capacity, D]. values: [B, Hk, capacity, Dv]. They hold as many tokens as there are positions.
        positions: int64 [B, m]. k: [B, Hk, t, D]. v: [B, Hk, t, Dv]. pos: int64 [B, t].
    """
    m, n = positions.shape[1], positions.shape[1] + k.shape[2]
    keys[:, :, m:n] = k
    values[:, :, m:n] = v
    return keys[:, :, :n], values[:, :, :n], torch.cat([positions, pos], 1)


@dataclass(frozen=True)
class Write:
    """Where the keys and the values of one layer stand among a graph's inputs, and its outputs."""

    inputs: tuple[int, int]
    outputs: tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class InPlace:
    """A graph captured from a call without images that takes rooms for the layers it appends to.

    It returns None in place of their keys and values, which are views of what it was given.
    """

    graph_module: torch.fx.GraphModule
    writes: tuple[Write, ...]

    @classmethod
    def of(cls, gm: torch.fx.GraphModule, roomy: bool) -> InPlace:
        """A copy of the graph; if the layers have room, each append to what only it reads of them is made in place."""
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
        (output,) = graph.find_nodes(op="output")
        outputs, writes = list(output.args[0]), []
        for node in graph.find_nodes(op="call_function", target=dialect.KV_APPEND):
            keys, values = node.args[:2]
            if not roomy or not all(x in inputs and set(x.users) == {node} for x in (keys, values)):
                continue
            node.target = kv_write
            made = [[i for i, x in enumerate(outputs) if _is_item(x, node, item)] for item in range(2)]
            for i in (*made[0], *made[1]):
                outputs[i] = None
            writes.append(Write((inputs[keys], inputs[values]), (tuple(made[0]), tuple(made[1]))))
        output.args = (tuple(outputs),)
        return cls(torch.fx.GraphModule(gm, graph), tuple(writes))

    def run(self, run: Callable[..., Any], cache: PositionCache, inputs: Sequence[Any], t: int) -> Any:
        """Run the graph, lowered and compiled to ``run``, on the captured inputs of a call with ``t`` tokens.

        Every layer has room for them (:meth:`vlmrewrite.cache.PositionCache.reserve`); one that is not written in
        place loses its room.
        """
        layers: list[Any] = cache.layers
        of_keys = {id(layer.keys): layer.own() for layer in layers}
        rooms = [of_keys[id(inputs[write.inputs[0]])] for write in self.writes]
        given = list(inputs)
        for room, write in zip(rooms, self.writes, strict=True):
            given[write.inputs[0]], given[write.inputs[1]] = room.keys, room.values
        out = list(run(*given))
        for room, write in zip(rooms, self.writes, strict=True):
            for places, shown in zip(write.outputs, room.show(room.shown[0].shape[2] + t), strict=True):
                for i in places:
                    out[i] = shown
        for layer in layers:
            layer.room = layer.room if layer.room in rooms else None
        return tuple(out)


def _is_item(node: object, source: torch.fx.Node, item: int) -> bool:
    return isinstance(node, torch.fx.Node) and node.target is operator.getitem and node.args == (source, item)
