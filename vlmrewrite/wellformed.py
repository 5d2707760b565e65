"""Verification of a rewritten graph: it is well formed, and no full-length value leaks into a token set."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmrewrite.anatomy import Anatomy, same, value, where
from vlmrewrite.legalize import Rewritten
from vlmrewrite.tokens import All

_CROSSING = {
    torch.ops.vlm.attention.default,
    torch.ops.vlm.select.default,
    torch.ops.vlm.restore.default,
}


def check(anatomy: Anatomy, rewritten: Rewritten) -> None:
    """Lint the graph and type every instantiated node: its inputs belong to the same token set, or to none.

    Raises:
        ValueError: a node mixes token sets; the message names it. That is a bug in the rewrite, not in a plan.
    """
    rewritten.graph_module.graph.lint()
    present = set(rewritten.graph_module.graph.nodes)
    for node, tokens in rewritten.typed.items():
        if node not in present or tokens == All or node.target in _CROSSING or "edit" in node.meta:
            continue
        for source in node.all_input_nodes:
            other = rewritten.typed.get(source)
            if other is not None and other != tokens:
                raise ValueError(f"{where(node)} runs on {tokens} but reads {source.name}, which is on {other}")
            x = value(source)
            if other is None and isinstance(x, Tensor) and any(same(n, anatomy.length) for n in x.shape):
                raise ValueError(f"{where(node)} runs on {tokens} but reads {source.name} of full length")
            if other is None and isinstance(x, torch.SymInt) and same(x, anatomy.length):
                raise ValueError(f"{where(node)} runs on {tokens} but uses the full length {source.name}")
