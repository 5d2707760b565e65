"""What is read of the stream behind a layer, outside of layers."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from vlmrewrite.analysis.anatomy import Anatomy
from vlmrewrite.analysis.graph import axis
from vlmrewrite.analysis.tokenwise import mixes


def of_last_column(anatomy: Anatomy) -> dict[int, frozenset[Node]]:
    """The layers behind which, apart from the next layer, nothing is made of any token but the last column's.

    So is the last layer, where the logits of one token are asked for, and nobody keeps the hidden states.

    Returns:
        for each of them, the graph's inputs that have to be 1 for it: how many logits are asked for.
    """
    inside = frozenset[Node]().union(*(layer.region for layer in anatomy.layers), *anatomy.between.values())
    found = {layer.index: _counts(layer.exit, inside, anatomy) for layer in anatomy.layers}
    return {index: counts for index, counts in found.items() if counts is not None}


def _counts(exit: Node, inside: frozenset[Node], anatomy: Anatomy) -> frozenset[Node] | None:
    """The numbers of last columns that are taken of what is made of a node; None if others are read."""
    todo, seen, counts = [exit], {exit}, set[Node]()
    while todo:
        node = todo.pop()
        for user in node.users.keys() - seen - inside:
            seen.add(user)
            count = _taken(user, axis(node, anatomy.length)) if user.target is operator.getitem else None
            if count is not None:
                counts |= {count} - {1}
            elif user.op == "output" or mixes(user, anatomy.length, anatomy.batch) is not None:
                return None
            else:
                todo.append(user)
    return frozenset(counts)


def _taken(item: Node, at: int | None) -> Any:
    """How many last columns are taken along an axis: 1, or an input of the graph; None if it is something else."""
    index: Any = item.args[1]
    found = index[at] if at is not None and isinstance(index, tuple) and len(index) > at else None
    if not isinstance(found, slice) or (found.stop, found.step) != (None, None):
        return None
    start: Any = found.start
    if isinstance(start, Node) and start.target is operator.neg and start.all_input_nodes[0].op == "placeholder":
        return start.all_input_nodes[0]
    return 1 if start == -1 else None
