"""A layer's nodes, instantiated for the token sets that they are needed on."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor
from torch.fx import Node

from vlmrewrite.analysis import Anatomy, Layer, axis, hidden_write, mixes, reachable, same, value, where
from vlmrewrite.ops import TOKENS
from vlmrewrite.plan import GROUPED, NEEDS, All, Last, TokenSet, contains
from vlmrewrite.rewrite.sets import Emitter, Sets, Stream

_VIEWS = {"unsqueeze", "to", "contiguous", "float", "type_as"}
vlm = torch.ops.vlm


class LayerNodes:
    """The captured nodes of the layer at hand, and their instances.

    Args:
        anatomy: of the captured graph.
        env: from captured nodes to those of the copy that is rewritten.
        emit, sets, stream: of that copy.

    Attributes:
        made: for each layer done so far, the set whose keys it has, these and their values, and all that it sees.
    """

    def __init__(self, anatomy: Anatomy, env: dict[Node, Node], emit: Emitter, sets: Sets, stream: Stream) -> None:
        self.anatomy, self.env, self.emit, self.sets, self.stream = anatomy, env, emit, sets, stream
        self._captured = {copy: node for node, copy in env.items()}
        self._swapped: dict[Node, Node] = {}
        self._affected: set[Node] = set()
        self._memo: dict[tuple[Node, TokenSet, object], Node] = {}
        self._behind: tuple[object, Node] | None = None
        self.made: dict[int, tuple[TokenSet, list[Node], list[Node]]] = {}
        self.past = any(x.append is not None and x.append.args[0] is not None for x in anatomy.layers)
        self.enter(anatomy.layers[0])

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
        self.stream = Stream(hidden, self.emit, self.sets, stream.states)
        self.stream.changed = True
        self.enter(layer)
        self.stream.views[tokens] = hidden
        yield
        self._swapped, self._affected, self.stream = {}, set(), stream
        self.enter(around)
        self.stream.views = views

    @property
    def away(self) -> bool:
        """Whether this is about a branch's block."""
        return bool(self._swapped)

    @property
    def alone(self) -> bool:
        """Whether no key comes from a cache."""
        return not self.past or self.away

    def argument(self, node: Node | None, i: int) -> Node:
        """An argument of a captured node, in the copy."""
        return self.env[cast(Any, node).args[i]]

    def maybe(self, x: Any) -> Any:
        """The copy of a captured node, or the constant itself."""
        return self.env[x] if isinstance(x, Node) else x

    def new_key(self, i: int, s: TokenSet) -> Node:
        """The new keys (0) or values (1) that a layer attends to, of a set's tokens, before the cache."""
        append, attention, owner = self.layer.append, self.layer.attention, self.layer.owner
        node = self.argument(append, 3 + i) if append is not None else self.argument(attention, 1 + i)
        if owner == self.layer.index:
            return self.value(node, s)
        held, new, _ = self.made.get(owner, (All, [node, node], []))
        assert contains(held, s), f"layer {owner} has no keys of {s}: the plan was to be checked for it"
        index = self.sets[s].index
        if held not in (All, s):
            index = self.emit.call(vlm.relative_index.default, self.sets[held].index, index)
        return new[i] if held == s else self.emit.call(vlm.select.default, new[i], index, 2, on=s)

    def expanded(self, s: TokenSet, *held: Node) -> list[Node]:
        """What the layer's attention takes for keys and values, of what the cache holds of a set, and held before."""
        attention, append, memo = self.layer.attention, self.layer.append, self._memo
        if append is None or self.layer.owner != self.layer.index:
            return list(held)
        self._memo, self._behind = dict(memo), (value(append)[0].shape[2], held[0])
        for item in (n for n in append.users if n.args[1] != 2):
            self.instead(self.env[item], s, held[cast(int, item.args[1])])
        made = [self.value(self.argument(attention, i), s) for i in (1, 2)]
        self._memo, self._behind = memo, None
        return made

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
            self._memo[key] = self._inside(node, s) if node in self._region else self._outside(node, s)
        return self._memo[key]

    def instead(self, node: Node, s: TokenSet, new: Node) -> None:
        """Use ``new`` as the instance of a node of the region."""
        self.emit.typed[new] = s
        self._memo[node, s, self._point()] = new

    def _point(self) -> object:
        return self.stream, self.stream.version

    def _inside(self, node: Node, s: TokenSet) -> Node:
        captured, a = self._captured[node], self.anatomy
        length = self._behind[0] if self._behind else a.length
        if (reason := hidden_write(captured) if s == All else mixes(captured, length, a.batch)) is not None:
            raise ValueError(f"{where(node)} inside layer {self.layer.index} cannot run on {s}: {reason}")
        return self._copy(node, s)

    def _copy(self, node: Node, s: TokenSet) -> Node:
        for source in node.all_input_nodes:
            self.value(source, s)
        graph = self.emit.graph
        with graph.inserting_before(self.emit.anchor):
            new = graph.node_copy(node, lambda n: self.value(n, s))
        self.emit.typed[new] = s
        return new

    def _outside(self, node: Node, s: TokenSet) -> Node:
        """A node that does not depend on the layer's stream: a size, a side table, or something without tokens."""
        x, length = value(node), self.anatomy.length
        if self._behind is not None and isinstance(x, torch.SymInt) and same(x, self._behind[0]):
            return self.emit.call(torch.ops.aten.sym_size.int, self._behind[1], 2)
        if isinstance(x, torch.SymInt):
            if same(x, length):
                return self.emit.extra("size", s)
            symbols = length.node.expr.free_symbols  # type: ignore[attr-defined]
            sized = node.op == "call_function" and x.node.expr.free_symbols & symbols
            return self._copy(node, s) if sized else node
        at = axis(node, length)
        if self._behind is not None and (at is not None or axis(node, self._behind[0]) is not None):
            raise ValueError(
                f"layer {self.layer.index} makes keys or values of what the cache holds and of {where(node)}, which has"
                " tokens of its own; expected them to be made of what is held alone"
            )
        if at is None:
            return self._copy(node, s) if node in self._affected else node
        if node.op == "call_method" and node.target in _VIEWS:
            return self._copy(node, s)
        shape = cast(Tensor, x).shape
        if at == 0 or not (same(shape[0], self.anatomy.batch) or same(shape[0], 1)):
            raise ValueError(
                f"{where(node)}, which layer {self.layer.index} reads, has shape {tuple(shape)}; expected tokens behind"
                " a batch axis"
            )
        return self.emit.call(vlm.select.default, node, self.sets[s].index, at, on=s)


@dataclass(frozen=True)
class GraphInputs:
    """What a policy or an edit asks for, made in the graph at the entry of the layer at hand.

    See :class:`vlmrewrite.plan.needs.Inputs`. ``tokens`` are a policy's source or an edit's tokens; ``per`` is what
    facts about images are given for.
    """

    tokens: TokenSet
    nodes: LayerNodes
    per: str

    def fact(self, name: str) -> Node:
        """An input of the graph."""
        return self.nodes.emit.extra(name, per=self.per if name in GROUPED else "image")

    def features(self) -> Node:
        """As the merge takes them, [F, C]; of images and videos, as they stand in the stream behind both merges."""
        anatomy, emit = self.nodes.anatomy, self.nodes.emit
        if len(anatomy.merges) > 1:
            stream = emit.call(torch.flatten, self.nodes.env[anatomy.merges[-1].node], 0, 1, along=None)
            return emit.call(torch.index_select, stream, 0, emit.extra("flat"), along=TOKENS)
        merged = anatomy.merges[0].merged
        node, dims = self.nodes.env[merged], cast(Tensor, value(merged)).dim()
        return node if dims == 2 else emit.call(torch.reshape, node, (-1, anatomy.hidden), along=TOKENS)

    def stream(self) -> Node:
        """The whole stream, up to date."""
        return self.nodes.stream.one(All)

    def prompt(self) -> Node:
        """Text up to the last prompt token."""
        emit = self.nodes.emit
        before = emit.call(operator.le, emit.extra("everywhere"), emit.extra("last"))
        return emit.call(operator.and_, emit.extra("text"), before)

    def attention(self, outside: bool) -> Node:
        """Scored outside of the layer's own attention."""
        scores = NEEDS["attention_outside" if outside else "attention"].scores
        assert scores is not None
        keys, nodes, emit = scores(self.tokens), self.nodes, self.nodes.emit
        layer, now, last = nodes.layer, nodes.sets[keys], nodes.sets[Last]
        q, positions = nodes.value(nodes.argument(layer.attention, 0), Last), now.positions
        new = [nodes.new_key(i, keys) for i in range(2)]
        if nodes.past:
            new = [emit.call(torch.cat, [nodes.argument(layer.append, i), x], 2) for i, x in enumerate(new)]
            positions = emit.call(torch.cat, [nodes.argument(layer.append, 2), positions], 1)
        k = nodes.expanded(keys, *new)[0]
        mask, scale, softcap = (nodes.maybe(layer.attention.args[i]) for i in (3, 6, 8))
        read = last.positions, positions, scale, softcap, now.index, now.valid, emit.extra("flat"), emit.extra("length")
        return emit.call(vlm.attention_received.default, q, k, mask, *read, along=TOKENS)
