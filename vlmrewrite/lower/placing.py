"""Several devices: operations run where their weights are, and what they take is copied there once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx
from torch.fx import Node
from torch.fx.node import map_arg

from vlmrewrite.analysis import cache_of, is_number
from vlmrewrite.compat import tree_leaves
from vlmrewrite.hf import Site, copied
from vlmrewrite.rewrite import with_blocks


def placed(
    gm: torch.fx.GraphModule, sites: Sequence[Site | None], main: torch.device, captured: torch.fx.Graph
) -> torch.fx.GraphModule:
    """A lowered graph that runs on several devices; the given graph is not changed.

    An operation runs where its weight is; one without, where the last weight was, if anything that it takes is there,
    or else where the last of what it takes was made. What comes from elsewhere is copied, once for all that take it.
    Keys, values and their positions stay where their layer runs; all else that is returned comes to ``main``.

    Args:
        gm: a rewritten and lowered graph.
        sites: where the captured graph's inputs are; None for numbers.
        main: where inputs are that the host adds, and what a call returns.
        captured: what ``gm`` was made of; its outputs are the first of ``gm``'s.
    """
    graph = copy.deepcopy(gm.graph)
    *nodes, output = graph.nodes
    inputs = graph.find_nodes(op="placeholder")
    given = {node: site for node, site in zip(inputs, sites, strict=False) if site is not None}
    owned = {node: site.device for node, site in given.items() if site.weight}
    at, copies, here = {node: site.device for node, site in given.items()}, dict[Any, Node](), main

    def take(source: Node, to: torch.device, user: Node) -> Node:
        if at[source] == to:
            return source
        if (source, to) not in copies:
            with graph.inserting_before(user):
                copies[source, to] = graph.call_function(copied, (source, to))
        return copies[source, to]

    for node in nodes:
        takes = [n for n in node.all_input_nodes if not is_number(n)]
        if node.op in ("placeholder", "get_attr"):
            at.setdefault(node, main)
            continue
        mine = [owned[n] for n in takes if n in owned]
        here = mine[0] if mine else here
        to = here if mine or any(at[n] == here for n in takes) else at[takes[-1]] if takes else main
        for n in takes:
            node.replace_input_with(n, take(n, to, node))
        named = any(isinstance(x, torch.device) for x in tree_leaves((node.args, node.kwargs)))
        at[node] = main if named else to
    outs: Any = output.args[0], captured.output_node().args[0]
    (returned, *rest), before = outs
    made: list[tuple[Any, Any, Any]] = [(n, x, cache_of(x)) for n, x in zip(returned, before, strict=True)]
    layers = {append: at[n] for n, x, append in made if append is not None and x.args[1] == 0}
    back = [take(n, layers.get(append, main), output) if isinstance(n, Node) else n for n, _, append in made]
    output.args = ((tuple(back), *map_arg(tuple(rest), lambda n: take(n, main, output))),)
    return with_blocks(gm, graph)
