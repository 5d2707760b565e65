"""Compiled decode steps that write into the buffers of a cache, where they would return a longer copy of it."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor

from vlmrewrite import ops
from vlmrewrite.analysis import append_of
from vlmrewrite.errors import CaptureError
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.lower.lowering import lower
from vlmrewrite.lower.pieces import behind, positions_apart
from vlmrewrite.ops import Kernels, Running


def _positioned(graph: torch.fx.Graph, plain: bool) -> None:
    """Let each attention take the positions of its new tokens and of all from the cache.

    They are the same nodes for layers that hold the same tokens, which so have one mask and go on to share positions.
    """
    first: dict[Any, tuple[Any, torch.fx.Node]] = {}
    for grown in graph.find_nodes(op="call_function", target=ops.KV_APPEND):
        mine = [user for user in grown.users if user.args == (grown, 2)]
        if not mine:
            with graph.inserting_after(grown):
                mine = [graph.call_function(operator.getitem, (grown, 2))]
        new, every = first.setdefault(grown.args[2], (grown.args[5], mine[0]))
        grown.args = (*grown.args[:5], new, *grown.args[6:])
        for node in mine:
            if node is not every:
                node.replace_all_uses_with(every)
                graph.erase_node(node)
    for node in (n for kind in (ops.ATTENTION, ops.INDEXED) for n in graph.find_nodes(op="call_function", target=kind)):
        append: Any = append_of(node.args[1])
        if append is None:
            raise RuntimeError(f"the keys of {node.name} are not made of what one layer of the cache holds")
        q, k, v, mask, _, _, scale, _, *rest = node.args
        node.args = (q, k, v, mask, *first[append.args[2]], scale, plain and mask is None, *rest)


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


def write(held: Tensor, new: Tensor, at: Tensor) -> Tensor:
    """Write to slots ``at`` int64 [t] of keys or values [B, Hk, C, D], or positions [B, C], in place."""
    return held.index_copy_(min(2, held.dim() - 1), at, new.to(held.dtype))


def _in_full(graph: torch.fx.Graph) -> None:
    """Let each append to a layer of a fixed size write to what it was given; the free slots are counted once."""
    inputs, slots = {*graph.find_nodes(op="placeholder")}, dict[Any, torch.fx.Node]()
    for grown in graph.find_nodes(op="call_function", target=ops.KV_APPEND):
        keys, values, positions, k, v, pos, _ = grown.args
        if not all(x in inputs and set(x.users) == {grown} for x in (keys, values)):
            raise CaptureError(f"something else than {grown.name} reads what its layer of the cache held before", "")
        with graph.inserting_before(grown):
            if first := positions not in slots:
                slots[positions] = graph.call_function(ops.free_slots, (positions, pos))
            made = [graph.call_function(write, (*x, slots[positions])) for x in ((keys, k), (values, v))]
            if first:
                made.append(graph.call_function(write, (positions, pos, slots[positions])))
        for item in list(grown.users):
            item.replace_all_uses_with(made[item.args[1]])
            graph.erase_node(item)
        graph.erase_node(grown)


class DecodeStep(NamedTuple):
    """A graph captured from a call without images, compiled, that takes buffers for the layers it appends to.

    It returns None in place of their keys and values, which are views of what it was given.

    Attributes:
        compiled: the graph, lowered and compiled.
        full: it writes to what it is given, which is all of each layer.
        writes: for each layer that is written in place, where its keys and its values stand among the inputs.
        shown: for each output that is None, which of these layers it is of, and 0 for its keys or 1 for its values.
    """

    compiled: Any
    full: bool
    writes: list[tuple[int, int]]
    shown: dict[int, tuple[int, int]]

    @classmethod
    def of(
        cls,
        gm: torch.fx.GraphModule,
        plain: bool,
        reserved: bool,
        full: bool,
        kernels: Kernels,
        device: torch.device,
        backend: Running,
    ) -> DecodeStep:
        """The step that a copy of a captured graph makes.

        Args:
            gm: the graph, with a cache.
            plain: no key of the cache is hidden from a query, except by causality.
            reserved: the layers have room: each append to what only it reads of them is made in place.
            full: they are of a fixed size: :mod:`vlmrewrite.kvcache.fixed`. Then all are made in place.
            kernels, device: as for :func:`vlmrewrite.lower.lowering.lower`.
            backend: what compiles it.

        Raises:
            RuntimeError: an attention's keys do not come from the cache, or it cannot be lowered so.
            CaptureError: ``full``, and a layer's keys are read beside what is appended to them.
        """
        graph = copy.deepcopy(gm.graph)
        _positioned(graph, plain)
        _in_full(graph) if full else positions_apart(graph)
        inputs = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
        (output,) = graph.find_nodes(op="output")
        appends = graph.find_nodes(op="call_function", target=ops.KV_APPEND) if reserved else []
        written = [n for n in appends if all(x in inputs and set(x.users) == {n} for x in n.args[:2])]
        for node in written:
            node.target = kv_write
        outputs, shown = list(output.args[0]), {}
        for i, x in enumerate(outputs):
            source, item = x.args if getattr(x, "target", None) is operator.getitem else (None, 2)
            if source in written and item < 2:
                shown[i] = written.index(source), item
                outputs[i] = None
        output.args = (tuple(outputs),)
        writes = [(inputs[n.args[0]], inputs[n.args[1]]) for n in written]
        made = lower(torch.fx.GraphModule(gm, graph), kernels, device).graph_module
        return cls(behind(made, backend), full, writes, shown)

    def run(self, cache: PositionCache, inputs: Sequence[Any], t: int) -> Any:
        """Run it on the captured inputs of a call with ``t`` tokens.

        Every layer has room for them (:meth:`vlmrewrite.kvcache.PositionCache.reserve`), if it is made for that; one
        that is not written in place loses its buffer.
        """
        if self.full:
            return self.compiled(*inputs)
        of_keys: dict[int, Any] = {id(layer.keys): layer.own() for layer in cache.attended}
        buffers = [of_keys[id(inputs[keys])] for keys, _ in self.writes]
        given = list(inputs)
        for buffer, (keys, values) in zip(buffers, self.writes, strict=True):
            given[keys], given[values] = buffer.keys, buffer.values
        out = list(self.compiled(*given))
        grown = [buffer.show(buffer.shown[0].shape[2] + t) for buffer in buffers]
        for i, (layer, item) in self.shown.items():
            out[i] = grown[layer][item]
        for one in cache.attended:
            one.buffer = one.buffer if one.buffer in buffers else None
        return tuple(out)
