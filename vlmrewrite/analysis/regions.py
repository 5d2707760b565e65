"""Parts of a forward that are under ``torch.no_grad`` or ``torch.autocast`` of its own, said by their nodes.

Dynamo marks where such a part begins and ends, and which nodes lie between only the graph's order says, which a rewrite
does not keep.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from vlmrewrite.analysis.graph import value
from vlmrewrite.compat import autocast_marks, gradient_mark

CASTING = "vlmrewrite_casting"
"""In a node's meta: the arguments of the ``torch.autocast`` that it runs under, if that is not the caller's."""


def regions(graph: Graph) -> None:
    """Take out the marks: what leaves a part without gradients is detached, nodes under autocast say so.

    A graph is captured with gradients on, which is how it begins.
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
                node.meta[CASTING] = [*casting.values()][-1]
            continue
        marks.append(node)
    for node in [n for n in graph.nodes if n in without]:
        outside = [user for user in node.users if user not in without]
        if outside and isinstance(x := value(node), Tensor) and x.is_floating_point():
            with graph.inserting_after(node):
                made = graph.call_function(torch.detach, (node,))
            made.meta = dict(node.meta)
            for user in outside:
                user.replace_input_with(node, made)
    for node in reversed(marks):
        graph.erase_node(node)
