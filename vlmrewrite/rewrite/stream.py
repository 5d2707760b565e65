"""The residual stream in a graph under rewriting, and the layers' nodes instantiated for token sets.

Between layers the stream is kept compact; tokens that a layer does not run on stay in the full stream, untouched.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor
from torch.fx import Node

from vlmrewrite import analysis
from vlmrewrite.analysis import Anatomy, Layer, axis, reachable, same, value, where
from vlmrewrite.plan import All, TokenSet, contains
from vlmrewrite.rewrite.sets import SetEmitter

_VIEWS = {"unsqueeze", "to", "contiguous", "float", "type_as"}

vlm = torch.ops.vlm


@dataclass
class Stream:
    """The residual stream: ``full`` [B, T, H], newer in ``part`` for the tokens of its set.

    ``views`` holds it for other sets, ``version`` tells apart what was computed before and after a change of it.
    """

    full: Node
    part: tuple[TokenSet, Node] | None = None
    changed: bool = False
    version: int = 0
    views: dict[TokenSet, Node] = field(default_factory=dict)

    def become(self, full: Node, part: tuple[TokenSet, Node] | None = None) -> None:
        """Go on with new values."""
        self.full, self.part, self.changed, self.views = full, part, True, {}
        self.version += 1


class StreamEmitter(SetEmitter):
    """Emits token sets, the stream for each of them, and a layer's nodes for each of them.

    Args:
        gm: the captured graph; a copy is worked on, :attr:`gm`.
        anatomy: its anatomy.
    """

    def __init__(self, gm: torch.fx.GraphModule, anatomy: Anatomy) -> None:
        self.old, self.length = anatomy, anatomy.length
        graph, self.env = torch.fx.Graph(), dict[Node, Node]()
        self.output = graph.output(graph.graph_copy(gm.graph, self.env))
        super().__init__(graph, self.env[anatomy.exit].next, self.env[anatomy.vision])
        self.gm = torch.fx.GraphModule(gm, graph)
        self.typed: dict[Node, TokenSet] = {}
        self.stream = Stream(self.env[anatomy.layers[0].entry])
        self.swapped: dict[Node, Node] = {}
        self._scopes = 0
        self._scope = 0
        self._affected: set[Node] = set()
        self._memo: dict[tuple[Node, TokenSet, object], Node] = {}
        self.enter(anatomy.layers[0])

    def enter(self, layer: Layer, region: frozenset[Node] | None = None, entry: Node | None = None) -> None:
        """What follows is about a layer, or a part of it that begins at ``entry``."""
        self.layer = layer
        self.region = {self.env[n] for n in (layer.region if region is None else region)}
        self.entry = self.env[layer.entry if entry is None else entry]
        self.stream.views = {}

    def old_arg(self, node: Node | None, i: int) -> Node:
        """An argument of a captured node, in the copy."""
        assert node is not None
        found = node.args[i]
        assert isinstance(found, Node)
        return self.env[found]

    def maybe(self, x: Any) -> Any:
        """The copy of a captured node, or the constant itself."""
        return self.env[x] if isinstance(x, Node) else x

    # ---- the stream

    def view(self, s: TokenSet) -> Node:
        """The stream at the current point, for the tokens of a set."""
        stream = self.stream
        if s in stream.views:
            return stream.views[s]
        if stream.part is not None and stream.part[0] == s:
            node = stream.part[1]
        elif stream.part is None:
            node = stream.full if s == All else self.call(vlm.select.default, stream.full, self.set(s).index)
        elif s != All and contains(stream.part[0], s):
            inner = self.call(vlm.relative_index.default, self.set(stream.part[0]).index, self.set(s).index)
            node = self.call(vlm.select.default, stream.part[1], inner)
        else:
            node = self.joined()
            node = node if s == All else self.call(vlm.select.default, node, self.set(s).index)
        stream.views[s] = node
        self.typed[node] = s
        return node

    def joined(self) -> Node:
        """The whole stream, up to date."""
        stream = self.stream
        if stream.part is None:
            return stream.full
        if All not in stream.views:
            s = self.set(stream.part[0])
            stream.views[All] = self.call(vlm.restore.default, stream.full, stream.part[1], s.index, s.valid)
            self.typed[stream.views[All]] = All
        return stream.views[All]

    def write(self, s: TokenSet, new: Node) -> None:
        """Replace the hidden states of a set's tokens."""
        self.typed[new] = s
        if s == All:
            self.stream.become(new)
            return
        part = self.stream.part
        same_set = part is not None and part[0] == s
        self.stream.become(self.stream.full if same_set else self.joined(), (s, new))

    # ---- instantiation

    def swap(self, parameters: dict[Node, Node]) -> None:
        """From now on, a layer's nodes read these in place of its parameters; with none, the layer's own again."""
        self.swapped = parameters
        self._affected = reachable(parameters)
        self._scopes += bool(parameters)
        self._scope = self._scopes if parameters else 0

    def value(self, node: Node, s: TokenSet) -> Node:
        """The node instantiated for the tokens of a set."""
        if node is self.entry:
            return self.view(s)
        if node in self.swapped:
            return self.swapped[node]
        inside = node in self.region or node in self._affected
        if s == All and not (inside and self.stream.changed):
            return node
        key = (node, s, (self._scope, self.stream.version) if inside else None)
        if key not in self._memo:
            self._memo[key] = self._clone(node, s) if node in self.region else self._outside(node, s)
        return self._memo[key]

    def instead(self, node: Node, s: TokenSet, new: Node) -> None:
        """Use ``new`` as the instance of a node of the region."""
        self.typed[new] = s
        self._memo[node, s, (self._scope, self.stream.version)] = new

    def _clone(self, node: Node, s: TokenSet) -> Node:
        reason = analysis.not_token_wise(node, self.length)
        if reason is not None and (s != All or analysis.hidden_write(node) is not None):
            raise ValueError(f"{where(node)} inside layer {self.layer.index} cannot run on {s}: {reason}")
        return self._copy(node, s)

    def _copy(self, node: Node, s: TokenSet) -> Node:
        for source in node.all_input_nodes:
            self.value(source, s)
        with self.graph.inserting_before(self.anchor):
            new = self.graph.node_copy(node, lambda n: self.value(n, s))
        self.typed[new] = s
        return new

    def _outside(self, node: Node, s: TokenSet) -> Node:
        """A node that does not depend on the layer's stream: a size, a side table, or something without tokens."""
        x = value(node)
        if isinstance(x, torch.SymInt):
            if same(x, self.length):
                return self.size(s)
            symbols = self.length.node.expr.free_symbols  # type: ignore[attr-defined]
            if node.op == "call_function" and x.node.expr.free_symbols & symbols:
                return self._copy(node, s)
            return node
        at = axis(node, self.length)
        if at is None:
            return self._copy(node, s) if node in self._affected else node
        if node.op == "call_method" and node.target in _VIEWS:
            return self._copy(node, s)
        shape = cast(Tensor, x).shape
        if at == 0 or not (same(shape[0], self.old.batch) or same(shape[0], 1)):
            raise ValueError(
                f"{where(node)}, which layer {self.layer.index} reads, has shape {tuple(shape)}; expected tokens behind"
                " a batch axis"
            )
        new = self.call(vlm.select.default, node, self.set(s).index, at)
        self.typed[new] = s
        return new
