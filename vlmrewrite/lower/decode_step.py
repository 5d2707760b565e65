"""Compiled decode steps that write into the buffers of a cache, where they would return a longer copy of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor

from vlmrewrite import ops
from vlmrewrite.kvcache import PositionCache


def positioned(gm: torch.fx.GraphModule, plain: bool) -> torch.fx.GraphModule:
    """A copy of a graph captured from a call without images, with each attention's positions taken from the cache.

    Args:
        gm: the captured graph, with a cache.
        plain: no key of the cache is hidden from a query, except by causality.

    Raises:
        RuntimeError: an attention's keys do not come from the cache.
    """
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    positions = _shared_positions(graph)
    for node in graph.find_nodes(op="call_function", target=ops.ATTENTION):
        append: Any = getattr(node.args[1], "args", (None,))[0]
        if getattr(append, "target", None) is not ops.KV_APPEND:
            raise RuntimeError(
                f"the keys of {node.name} did not come from vlmrewrite's cache: this model transforms its keys after"
                " the cache, which is not supported"
            )
        q, k, v, mask, _, _, scale, _, *rest = node.args
        node.args = (q, k, v, mask, *positions[append], scale, plain and mask is None, *rest)
    return torch.fx.GraphModule(gm, graph)


def _shared_positions(graph: torch.fx.Graph) -> dict[torch.fx.Node, tuple[Any, Any]]:
    """For each append to a cache, the positions of its new tokens and of all.

    They are the same nodes for layers that hold the same tokens, which so have one mask and go on to share positions.
    """
    first: dict[Any, tuple[Any, Any]] = {}
    out = {}
    for append in graph.find_nodes(op="call_function", target=ops.KV_APPEND):
        with graph.inserting_after(append):
            mine = graph.call_function(operator.getitem, (append, 2))
        out[append] = first.setdefault(append.args[2], (append.args[5], mine))
        for user in list(append.users):
            if user.args == (append, 2) and user is not mine:
                user.replace_all_uses_with(out[append][1])
                graph.erase_node(user)
    return out


def kv_write(
    keys: Tensor, values: Tensor, positions: Tensor, k: Tensor, v: Tensor, pos: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`vlmrewrite.ops.attention.kv_append` does, for a :class:`vlmrewrite.kvcache.buffer.Buffer`, and in it.

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
class DecodeStep:
    """A graph captured from a call without images that takes buffers for the layers it appends to.

    It returns None in place of their keys and values, which are views of what it was given.
    """

    graph_module: torch.fx.GraphModule
    writes: tuple[Write, ...]

    @classmethod
    def of(cls, gm: torch.fx.GraphModule, reserved: bool) -> DecodeStep:
        """A copy of the graph; if the layers have room, each append to what only it reads of them is made in place."""
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
        (output,) = graph.find_nodes(op="output")
        outputs, writes = list(output.args[0]), []
        for node in graph.find_nodes(op="call_function", target=ops.KV_APPEND):
            keys, values = node.args[:2]
            if not reserved or not all(x in inputs and set(x.users) == {node} for x in (keys, values)):
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

        Every layer has room for them (:meth:`vlmrewrite.kvcache.PositionCache.reserve`); one that is not written in
        place loses its buffer.
        """
        layers: list[Any] = cache.layers
        of_keys = {id(layer.keys): layer.own() for layer in layers}
        buffers = [of_keys[id(inputs[write.inputs[0]])] for write in self.writes]
        given = list(inputs)
        for buffer, write in zip(buffers, self.writes, strict=True):
            given[write.inputs[0]], given[write.inputs[1]] = buffer.keys, buffer.values
        out = list(run(*given))
        for buffer, write in zip(buffers, self.writes, strict=True):
            for places, shown in zip(write.outputs, buffer.show(buffer.shown[0].shape[2] + t), strict=True):
                for i in places:
                    out[i] = shown
        for layer in layers:
            layer.buffer = layer.buffer if layer.buffer in buffers else None
        return tuple(out)


def _is_item(node: object, source: torch.fx.Node, item: int) -> bool:
    return isinstance(node, torch.fx.Node) and node.target is operator.getitem and node.args == (source, item)
