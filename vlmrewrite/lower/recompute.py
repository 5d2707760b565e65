"""Layers whose activations the backward pass computes again, instead of keeping them (activation checkpointing)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx.passes.utils.fuser_utils import fuse_by_partitions

from vlmrewrite import ops

MIXERS = (ops.attention, ops.attend, ops.kernel_attention, ops.REFERENCES[ops.RECURRENT], ops.REFERENCES[ops.INDEXED])


class _Recomputed(nn.Module):
    def __init__(self, run: Callable[..., Any], part: nn.Module) -> None:
        super().__init__()
        self.run, self.part = run, part

    def forward(self, *inputs: Any) -> Any:
        return self.run(self.part, *inputs)


def recomputed(gm: torch.fx.GraphModule, run: Callable[..., Any], which: Sequence[bool]) -> torch.fx.GraphModule:
    """A lowered graph whose layers go through ``run``; the given graph is not changed.

    A layer ends where the fewest values lie between its attention (or recurrence) and the next one's: where there is
    nothing but the stream, and what all layers share. What comes before the first layer and behind the last is kept.

    Args:
        gm: a lowered graph.
        run: given a part of the graph and its inputs, returns its outputs, as ``torch.utils.checkpoint.checkpoint``.
        which: layers to compute again, in order; a graph with more (branches) computes those too.
    """
    graph = torch.fx.Graph()
    output = graph.output(graph.graph_copy(gm.graph, {}))
    made = torch.fx.GraphModule(gm, graph)
    nodes = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
    order = {n: i for i, n in enumerate(nodes)}
    ends = [max((order[u] for u in n.users if u is not output), default=order[n]) for n in nodes]
    change = [0] * (len(nodes) + 1)
    for i, end in enumerate(ends):
        change[i] += 1
        change[end] -= 1
    live = [*accumulate(change)]
    mixers = [i for i, n in enumerate(nodes) if n.op == "call_function" and n.target in MIXERS]
    cuts = [min(range(b - 1, a - 1, -1), key=live.__getitem__) for a, b in pairwise([0, *mixers, len(nodes)])]
    parts = [nodes[a + 1 : b + 1] for a, b in pairwise(cuts)]
    some = [dict.fromkeys(part) for i, part in enumerate(parts) if i >= len(which) or which[i]]
    made = fuse_by_partitions(made, some, prefix="layer_")
    for node in made.graph.find_nodes(op="call_module"):
        setattr(made, node.target, _Recomputed(run, made.get_submodule(node.target)))
    return made
