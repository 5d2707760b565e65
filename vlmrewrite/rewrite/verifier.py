"""Verification of a rewritten graph: it is well formed, and no full-length value leaks into a token set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch import Tensor
from torch.fx import Node

from vlmrewrite.analysis import Anatomy, axis, same, value, where
from vlmrewrite.compat import fake_mode
from vlmrewrite.plan import All, TokenSet
from vlmrewrite.rewrite.legalize import Rewritten

vlm = torch.ops.vlm

_CROSSING = {vlm.attention.default, vlm.indexed.default, vlm.select.default, vlm.restore.default}


def check_sets(anatomy: Anatomy, rewritten: Rewritten) -> None:
    """Lint the graph and type every instantiated node: its inputs belong to the same token set, or to none.

    Raises:
        ValueError: a node mixes token sets; the message names it. That is a bug in the rewrite, not in a plan.
    """
    rewritten.graph_module.graph.lint()
    present = set(rewritten.graph_module.graph.nodes)
    for node, tokens in rewritten.typed.items():
        if node not in present or tokens == All or node.target in _CROSSING or "asked_by" in node.meta:
            continue
        for source in node.all_input_nodes:
            other = rewritten.typed.get(source)
            if other is not None and other != tokens:
                raise ValueError(f"{where(node)} runs on {tokens} but reads {source.name}, which is on {other}")
            x = value(source)
            sizes = x.shape if isinstance(x, Tensor) else [x] if isinstance(x, torch.SymInt) else []
            if other is None and any(same(n, anatomy.length) for n in sizes):
                raise ValueError(f"{where(node)} runs on {tokens} but reads {source.name}, of full length")


def propagate_fakes(
    anatomy: Anatomy, rewritten: Rewritten, arguments: Sequence[Any], size: Callable[[TokenSet], int]
) -> None:
    """Run the graph on fake tensors: every node takes its inputs, and holds as many tokens as its set.

    Args:
        anatomy: of the captured graph.
        rewritten: the rewritten one.
        arguments: its inputs in a call.
        size: length of a set's index in that call.

    Raises:
        ValueError: a node does not; the message names it. That is a bug in the rewrite, not in a plan.
    """
    on_meta = any(isinstance(x, Tensor) and x.is_meta for x in arguments)
    if on_meta:  # then what the host adds is not there either
        arguments = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
    with fake_mode() as mode:
        fakes = [mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x for x in arguments]
        _Propagation(anatomy, rewritten, size).run(*fakes)


def cone_of(gm: torch.fx.GraphModule, *nodes: Node) -> torch.fx.GraphModule:
    """The part of a graph that computes some nodes, from the same inputs; it returns a tuple of them."""
    graph, env = torch.fx.Graph(), dict[Node, Node]()
    graph.graph_copy(gm.graph, env)
    graph.output(tuple(env[node] for node in nodes))
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return torch.fx.GraphModule(gm, graph)


class _Propagation(torch.fx.Interpreter):
    """A run on fake tensors."""

    def __init__(self, anatomy: Anatomy, rewritten: Rewritten, size: Callable[[TokenSet], int]) -> None:
        super().__init__(rewritten.graph_module)
        self.length, self.typed, self.size = anatomy.length, rewritten.typed, size

    def run_node(self, n: Node) -> Any:
        try:
            out = super().run_node(n)
        except Exception as e:
            raise ValueError(f"{where(n)} does not take its inputs in the rewritten graph: {e}") from e
        tokens = self.typed.get(n)
        at = None if tokens is None or not isinstance(out, Tensor) else axis(n, self.length)
        if tokens is not None and at is not None and out.shape[at] != self.size(tokens):
            raise ValueError(f"{where(n)} has shape {tuple(out.shape)}, not {self.size(tokens)} tokens at axis {at}")
        return out
