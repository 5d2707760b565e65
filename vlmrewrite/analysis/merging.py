"""A merge that writes features into the embeddings in place becomes one that returns new embeddings."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from vlmrewrite.analysis.graph import value
from vlmrewrite.analysis.operators import FRESH


def merges_as_new(gm: GraphModule) -> None:
    """Let ``embeddings[mask] = features`` be a node that those behind it read, so that they depend on the features."""
    for n in gm.graph.find_nodes(op="call_function", target=operator.setitem):
        if not all(isinstance(x, Node) for x in n.args) or n.args[0].target not in FRESH:
            continue
        x, mask, features = (value(a) for a in n.args)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() != x.dim() - 1 or features.dim() != 2:
            continue
        with gm.graph.inserting_before(n):
            tokens = gm.graph.call_method("select", (n.args[0], -1, 0))
            at = gm.graph.call_method("expand_as", (n.args[1], tokens))  # [B, T], by the sizes of the embeddings
            where = gm.graph.call_method("unsqueeze", (at, -1))
            new = gm.graph.call_method("masked_scatter", (n.args[0], where, n.args[2]))
        seen = x.new_empty(x.shape[:-1], dtype=torch.bool)
        made = {tokens: x.select(-1, 0), at: seen, where: seen.unsqueeze(-1), new: x}
        for node, example in made.items():
            node.meta = dict(n.meta) | {"example_value": example}
        n.args[0].replace_all_uses_with(new, lambda user, n=n: user > n)
        gm.graph.erase_node(n)
    gm.recompile()
