"""Parts of a forward that are under ``torch.no_grad`` or ``torch.autocast`` of its own, said by their nodes.

Dynamo marks where such a part begins and ends, and which nodes lie between only the graph's order says, which a rewrite
does not keep.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from vlmrewrite.analysis.graph import value
from vlmrewrite.compat import autocast_marks, gradient_mark

CASTING = "vlmrewrite_casting"
"""In a node's meta: the arguments of each ``torch.autocast`` that it runs under, beside the caller's."""


def regions(graph: Graph, gradients: bool) -> None:
    """Take out the marks: what leaves a part without gradients is detached, nodes under autocast say so.

    Args:
        graph: changed in place.
        gradients: whether they were on where it was captured; where they were not, there are none to keep out.
    """
    (enter, leave), enabled, casting = autocast_marks(), True, dict[Node, Any]()
    without, marks = set[Node](), list[Node]()
    for node in graph.nodes:
        if node.target is gradient_mark():
            (enabled,) = node.args
        elif node.target is enter:
            casting[node] = node.args
        elif node.target is leave:
            del casting[node.args[0]]
        else:
            if not enabled or (node.target is operator.getitem and node.args[0] in without):
                without.add(node)
            if casting:
                node.meta[CASTING] = [*casting.values()]
            continue
        marks.append(node)
    for node in [n for n in graph.nodes if n in without] if gradients else []:
        outside, x = [user for user in node.users if user not in without], value(node)
        if outside and isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex()):
            with graph.inserting_after(node):
                made = graph.call_function(torch.detach, (node,))
            made.meta = dict(node.meta)
            for user in outside:
                user.replace_input_with(node, made)
    for node in reversed(marks):
        graph.erase_node(node)


def cast(graph: Graph) -> None:
    """Run each node that says so under ``torch.autocast``, as in the part of the forward that it comes from."""
    enter, leave = autocast_marks()
    for node in [node for node in graph.nodes if CASTING in node.meta]:
        with graph.inserting_before(node):
            begun = [graph.call_function(enter, tuple(args)) for args in node.meta[CASTING]]
        for one in begun:
            with graph.inserting_after(node):
                graph.call_function(leave, (one,))


def as_cast(gm: GraphModule) -> GraphModule:
    """A graph module as it is to run: itself, or a copy with what :func:`cast` puts in."""
    if not any(CASTING in node.meta for node in gm.graph.nodes):
        return gm
    cast(graph := copy.deepcopy(gm.graph))
    return GraphModule(gm, graph)
