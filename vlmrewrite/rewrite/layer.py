"""A layer's nodes, instantiated for the token sets that they are needed on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor
from torch.fx import Node

from vlmrewrite.analysis import Anatomy, Layer, axis, hidden_write, not_token_wise, reachable, same, value, where
from vlmrewrite.plan import All, TokenSet
from vlmrewrite.rewrite.sets import Emitter, Sets
from vlmrewrite.rewrite.stream import Stream

_VIEWS = {"unsqueeze", "to", "contiguous", "float", "type_as"}
vlm = torch.ops.vlm


class LayerNodes:
    """The captured nodes of the layer at hand, and their instances.

    Args:
        anatomy: of the captured graph.
        env: from captured nodes to those of the copy that is rewritten.
        emit, sets, stream: of that copy.
        typed: notes the token set of each instance.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        env: dict[Node, Node],
        emit: Emitter,
        sets: Sets,
        stream: Stream,
        typed: dict[Node, TokenSet],
    ) -> None:
        self.env, self.stream = env, stream
        self._anatomy, self._emit, self._sets, self._typed = anatomy, emit, sets, typed
        self._swapped: dict[Node, Node] = {}
        self._affected: set[Node] = set()
        self._memo: dict[tuple[Node, TokenSet, object], Node] = {}
        first = anatomy.layers[0]
        self.past = first.append is not None and first.append.args[0] is not None
        self.enter(first)

    def enter(self, layer: Layer, region: frozenset[Node] | None = None, entry: Node | None = None) -> None:
        """What follows is about a layer, or a part of it that begins at ``entry``."""
        self.layer = layer
        self._region = {self.env[n] for n in (layer.region if region is None else region)}
        self._entry = self.env[layer.entry if entry is None else entry]
        self.stream.views = {}

    @contextlib.contextmanager
    def aside(self, layer: Layer, parameters: dict[Node, Node], tokens: TokenSet, hidden: Node) -> Iterator[None]:
        """While the block runs: a layer, with other parameters, on a stream of its own of some tokens."""
        around, stream, views = self.layer, self.stream, self.stream.views
        self._swapped, self._affected = parameters, reachable(parameters)
        self.stream = Stream(hidden, self._emit, self._sets, self._typed)
        self.stream.changed = True
        self.enter(layer)
        self.stream.views[tokens] = hidden
        yield
        self._swapped, self._affected = {}, set()
        self.stream = stream
        self.enter(around)
        self.stream.views = views

    @property
    def alone(self) -> bool:
        """Whether no key comes from a cache."""
        return not self.past or bool(self._swapped)

    def argument(self, node: Node | None, i: int) -> Node:
        """An argument of a captured node, in the copy."""
        assert node is not None
        found = node.args[i]
        assert isinstance(found, Node)
        return self.env[found]

    def maybe(self, x: Any) -> Any:
        """The copy of a captured node, or the constant itself."""
        return self.env[x] if isinstance(x, Node) else x

    def new_key(self, i: int, s: TokenSet) -> Node:
        """The layer's own new keys (0) or values (1) of a set's tokens, before the cache."""
        append, attention = self.layer.append, self.layer.attention
        return self.value(self.argument(append, 3 + i) if append is not None else self.argument(attention, 1 + i), s)

    def value(self, node: Node, s: TokenSet) -> Node:
        """The node instantiated for the tokens of a set."""
        if node is self._entry:
            return self.stream.view(s)
        if node in self._swapped:
            return self._swapped[node]
        inside = node in self._region or node in self._affected
        if s == All and not (inside and self.stream.changed):
            return node
        key = (node, s, self._point() if inside else None)
        if key not in self._memo:
            self._memo[key] = self._clone(node, s) if node in self._region else self._outside(node, s)
        return self._memo[key]

    def instead(self, node: Node, s: TokenSet, new: Node) -> None:
        """Use ``new`` as the instance of a node of the region."""
        self._typed[new] = s
        self._memo[node, s, self._point()] = new

    def _point(self) -> object:
        return self.stream, self.stream.version

    def _clone(self, node: Node, s: TokenSet) -> Node:
        reason = not_token_wise(node, self._anatomy.length)
        if reason is not None and (s != All or hidden_write(node) is not None):
            raise ValueError(f"{where(node)} inside layer {self.layer.index} cannot run on {s}: {reason}")
        return self._copy(node, s)

    def _copy(self, node: Node, s: TokenSet) -> Node:
        for source in node.all_input_nodes:
            self.value(source, s)
        graph = self._emit.graph
        with graph.inserting_before(self._emit.anchor):
            new = graph.node_copy(node, lambda n: self.value(n, s))
        self._typed[new] = s
        return new

    def _outside(self, node: Node, s: TokenSet) -> Node:
        """A node that does not depend on the layer's stream: a size, a side table, or something without tokens."""
        x, length = value(node), self._anatomy.length
        if isinstance(x, torch.SymInt):
            if same(x, length):
                return self._emit.extra("size", s)
            symbols = length.node.expr.free_symbols  # type: ignore[attr-defined]
            if node.op == "call_function" and x.node.expr.free_symbols & symbols:
                return self._copy(node, s)
            return node
        at = axis(node, length)
        if at is None:
            return self._copy(node, s) if node in self._affected else node
        if node.op == "call_method" and node.target in _VIEWS:
            return self._copy(node, s)
        shape = cast(Tensor, x).shape
        if at == 0 or not (same(shape[0], self._anatomy.batch) or same(shape[0], 1)):
            raise ValueError(
                f"{where(node)}, which layer {self.layer.index} reads, has shape {tuple(shape)}; expected tokens behind"
                " a batch axis"
            )
        new = self._emit.call(vlm.select.default, node, self._sets[s].index, at)
        self._typed[new] = s
        return new
