"""Which axis of a value in a graph holds rows, as the symbolic shapes say, and which nodes take rows together."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch.fx
from torch import Tensor
from torch.fx import Node

from vlmrewrite.analysis.anatomy import Anatomy
from vlmrewrite.analysis.graph import is_number, sizes, symbols, value, where
from vlmrewrite.analysis.operators import CONSTANTS, SIZES, called
from vlmrewrite.compat import tree_leaves
from vlmrewrite.ops import ATTENTION, INDEXED, KV_APPEND, RECURRENT, ROWS, TOKENS, Along, Join

ALONG = "along"
"""Where a node that a rewrite adds says which axis holds its rows."""


class Rows:
    """What the symbolic shapes of a captured graph say of rows.

    The batch size has several symbols where nothing told the tracer that they are one: what attention and the cache
    take has rows first.

    Args:
        graph: the captured graph.
        anatomy: of it.
    """

    def __init__(self, graph: torch.fx.Graph, anatomy: Anatomy) -> None:
        self._batch, self._tokens = _symbols([anatomy.batch]), None
        for target in (ATTENTION, INDEXED, KV_APPEND, RECURRENT):
            for node in graph.find_nodes(op="call_function", target=target):
                given = [x for n in node.all_input_nodes if isinstance(x := value(n), Tensor)]
                self._batch |= _symbols(x.shape[0] for x in given)
        inputs = graph.find_nodes(op="placeholder")
        shapes = [sizes(n) for n in inputs if isinstance(value(n), Tensor)]
        of_rows, others = (
            _symbols(n for shape in shapes if bool(self._batch & {*shape}) == rows for n in shape)
            for rows in (True, False)
        )
        numbers = _symbols(n for node in inputs if is_number(node) for n in sizes(node))
        self._lengths = (of_rows | (numbers - others)) - self._batch
        if len(anatomy.merges) == 1:
            self._tokens = sizes(anatomy.merges[0].merged)[0]

    def along(self, node: Node, some: bool = False) -> Along:
        """Where a node's value holds rows.

        Args:
            node: of a rewritten graph, or the captured one.
            some: whether it is a captured node's copy for some tokens. Those of each row are others: where one row
                stood for all of them, all rows stand.

        Raises:
            ValueError: that is not known.
        """
        x = value(node)
        if node.op == "get_attr":
            return None
        if x is None and node.meta.get(ALONG) is not None:
            return node.meta[ALONG]  # type: ignore[no-any-return]
        if isinstance(x, Tensor) or is_number(node):
            shape = sizes(node)
            at = [d for d, n in enumerate(shape) if n in self._batch or (some and d == 0 and n == 1)]
            others = _symbols(n for d, n in enumerate(shape) if d not in at)
            if not at and not some and others <= self._lengths:
                return None
            if len(at) == 1 and not self._batch & others:
                return at[0] if isinstance(x, Tensor) else ROWS
            if isinstance(x, Tensor) and shape[:1] == [self._tokens]:
                return TOKENS
        found = tuple(x.shape) if isinstance(x, Tensor) else x
        raise ValueError(f"where {where(node)} holds rows is not known, shape {found}")

    def check_apart(self, node: Node) -> None:
        """Raise ValueError for a captured node, or its copy for all tokens, that takes rows together."""
        if is_number(node) or called(node) in CONSTANTS | SIZES or node.meta.get(ALONG) is not None:
            return
        if any(map(self._has_rows, node.all_input_nodes)) and not self._has_rows(node):
            raise ValueError(f"{where(node)} takes rows together")

    def _has_rows(self, node: Node) -> bool:
        """Whether all tensors that a node stands for, one at least, have an axis of rows."""
        shapes = [_symbols(x.shape) for x in tree_leaves(value(node)) if isinstance(x, Tensor)]
        return (bool(shapes) and all(self._batch & s for s in shapes)) or node.meta.get(ALONG) == 0

    def join(self, output: Any) -> Join | str | None:
        """How a captured output is put together, None where it is the same for all rows; or why it cannot be."""
        try:
            if not isinstance(output, Node) or (is_number(output) and self.along(output) is None):
                return None
            axis = self.along(output)
        except ValueError as e:
            return str(e)
        if not isinstance(axis, int):
            return f"{where(output)}, an output, is of all rows together"
        cached = output.target is operator.getitem and output.all_input_nodes[0].target is KV_APPEND
        return Join(axis, (-1 if output.args[1] == 2 else 0) if cached else None)


def _symbols(numbers: Iterable[Any]) -> set[Any]:
    return set().union(*map(symbols, numbers))
