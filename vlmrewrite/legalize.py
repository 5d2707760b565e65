"""Legalize: the one generic rewrite from a plan to a graph, for every technique and every combination of them.

Each layer's nodes are instantiated for the token sets they are needed on: the query slice and what follows the
attention for the set the layer runs on, the key and value slices for the set it attends to. Between layers the stream
is kept compact; tokens that a layer does not run on stay in the full stream, untouched, and are joined at the end.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.fx
from torch import Tensor
from torch.fx import Node

from vlmrewrite import tokenwise
from vlmrewrite.anatomy import Anatomy, Layer, axis, same, value, where
from vlmrewrite.emit import Extra, SetEmitter
from vlmrewrite.plan import Plan
from vlmrewrite.tokens import All, Last, Selection, Text, TokenSet, contains, union

_VIEWS = {"unsqueeze", "to", "contiguous", "float", "type_as"}
vlm = torch.ops.vlm


@dataclass
class Rewritten:
    """A rewritten graph.

    Attributes:
        graph_module: captured inputs, then ``extras``; returns (captured outputs, chosen bool [F] of each selection).
        extras: its additional inputs, in order.
        selections: what the second output holds, in order.
        typed: token set of each instantiated node, for verification.
    """

    graph_module: torch.fx.GraphModule
    extras: tuple[Extra, ...]
    selections: tuple[Selection, ...]
    typed: dict[Node, TokenSet]


@dataclass
class _Stream:
    """The residual stream: ``full`` [B, T, H], newer in ``part`` for the tokens of its set."""

    full: Node
    part: tuple[TokenSet, Node] | None = None
    changed: bool = False
    views: dict[TokenSet, Node] = field(default_factory=dict)


def legalize(gm: torch.fx.GraphModule, anatomy: Anatomy, plan: Plan) -> Rewritten:
    """Rewrite a copy of a captured graph so that it does what the plan says; the given graph is not changed.

    Raises:
        ValueError: a node inside a layer cannot be computed on a subset of the tokens; the message names it.
    """
    plan.check()
    return _Legalizer(gm, anatomy, plan).run()


class _Legalizer(SetEmitter):
    def __init__(self, gm: torch.fx.GraphModule, anatomy: Anatomy, plan: Plan) -> None:
        self.old, self.plan, self.length = anatomy, plan, anatomy.length
        graph, self.env = torch.fx.Graph(), dict[Node, Node]()
        self.output = graph.output(graph.graph_copy(gm.graph, self.env))
        super().__init__(graph, self.env[anatomy.exit].next, self.env[anatomy.vision])
        self.gm = torch.fx.GraphModule(gm, graph)
        self.memo: dict[tuple[Node, TokenSet], Node] = {}
        self.typed: dict[Node, TokenSet] = {}
        self.regions = {self.env[n] for layer in anatomy.layers for n in layer.region}
        self.originals = set(graph.nodes)
        self.past = anatomy.layers[0].append is not None and anatomy.layers[0].append.args[0] is not None

    def run(self) -> Rewritten:
        stream = _Stream(self.env[self.old.layers[0].entry])
        selections = self.plan.selections()
        for layer, entry in zip(self.old.layers, self.plan.layers, strict=True):
            self.layer = layer
            self.region = {self.env[n] for n in layer.region}
            self.entry = self.env[layer.entry]
            self.stream = stream
            stream.views = {}
            for s in (s for s in selections if s.at == layer.index):
                self._choose(s)
            self._rewrite(layer, entry.run_set, entry.keys)
        self._finish(selections)
        return Rewritten(self.gm, tuple(self.extras), tuple(selections), self.typed)

    def _choose(self, s: Selection) -> None:
        """Emit a selection at the layer it happens at."""
        member = self.which(s.source)
        supply: dict[str, Callable[[], Node]] = {
            "features": self._features,
            "encoder_features": lambda: self.extra("encoder_features"),
            "ordinal": lambda: self.extra("ordinals"),
            "attention": lambda: self._attention(union(Text, s.source)),
        }
        inputs = [supply[need]() for need in s.policy.needs]
        given = member, self.extra("lengths"), self.extra("keep", s)
        chosen = self.call(s.policy.op, *inputs, *given, *s.policy.options)
        self.chosen[s] = self.call(vlm.checked.default, chosen, *given, s.policy.name)

    def _features(self) -> Node:
        node = self.env[self.old.merged_features]
        x = value(self.old.merged_features)
        assert isinstance(x, Tensor)
        return node if x.dim() == 2 else self.call(torch.flatten, node, 0, x.dim() - 2)

    def _attention(self, current: TokenSet) -> Node:
        """What the last prompt token pays to each vision token in this layer, scored outside of it."""
        layer, append, now = self.layer, self.layer.append, self.set(current)
        q = self.value(self._arg(layer.attention, 0), Last)
        k = self.value(self._arg(append, 3) if append is not None else self._arg(layer.attention, 1), current)
        positions = now.positions
        if self.past:
            assert append is not None
            k = self.call(torch.cat, [self._arg(append, 0), k], 2)
            positions = self.call(torch.cat, [self._arg(append, 2), positions], 1)
        mask, scale, softcap = self._maybe(layer.attention.args[3]), layer.attention.args[6], layer.attention.args[8]
        return self.call(
            vlm.attention_received.default, q, k, mask, self.set(Last).positions, positions, scale, softcap,
            now.index, now.valid, self.extra("flat"), self.extra("length"),
        )  # fmt: skip

    # ---- the stream

    def view(self, s: TokenSet) -> Node:
        """The stream at the current layer's entry, for the tokens of a set."""
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
            node = self._joined()
            node = node if s == All else self.call(vlm.select.default, node, self.set(s).index)
        stream.views[s] = node
        self.typed[node] = s
        return node

    def _joined(self) -> Node:
        """The whole stream, up to date."""
        stream = self.stream
        if stream.part is None:
            return stream.full
        if All not in stream.views:
            s = self.set(stream.part[0])
            stream.views[All] = self.call(vlm.restore.default, stream.full, stream.part[1], s.index, s.valid)
            self.typed[stream.views[All]] = All
        return stream.views[All]

    # ---- instantiation

    def _arg(self, node: Node | None, i: int) -> Node:
        assert node is not None
        found = node.args[i]
        assert isinstance(found, Node)
        return self.env[found]

    def _maybe(self, x: Any) -> Any:
        return self.env[x] if isinstance(x, Node) else x

    def value(self, node: Node, s: TokenSet) -> Node:
        """The node instantiated for the tokens of a set."""
        if node is self.entry:
            return self.view(s)
        if s == All and (node not in self.region or not self.stream.changed):
            return node
        key = (node, s)
        if key not in self.memo:
            self.memo[key] = self._clone(node, s) if node in self.region else self._outside(node, s)
        return self.memo[key]

    def _clone(self, node: Node, s: TokenSet) -> Node:
        reason = tokenwise.refuse(node, self.length)
        if reason is not None and s != All:
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
            return node
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

    def _rewrite(self, layer: Layer, run: TokenSet, keys: TokenSet) -> None:
        stream, exit = self.stream, self.env[layer.exit]
        if run == All and keys == All and not stream.changed and not self.past:
            stream.full = exit
            return
        part, joined = stream.part, None
        if part is not None and part[0] != run:
            joined = self._joined()
        append = layer.append
        if append is not None:
            new_k, new_v = self.value(self._arg(append, 3), keys), self.value(self._arg(append, 4), keys)
            old = [self._maybe(append.args[i]) for i in range(3)]
            grown = self.call(vlm.kv_append.default, *old, new_k, new_v, self.set(keys).positions)
            k, v, k_pos = (self.call(operator.getitem, grown, i) for i in range(3))
            for user in list(self.env[append].users):
                if user.target is operator.getitem:
                    user.replace_all_uses_with((k, v, k_pos)[int(user.args[1])], delete_user_cb=self._is_output)  # type: ignore[arg-type]
        else:
            k, v = (self.value(self._arg(layer.attention, i), keys) for i in (1, 2))
            k_pos = self.set(keys).positions
        mask = self._maybe(layer.attention.args[3])
        plain: Any = False
        if not self.past and mask is None and run == keys:
            plain = self.extra("dense", run)
        q = self.value(self._arg(layer.attention, 0), run)
        rest = [self._maybe(a) for a in layer.attention.args[6:]]
        q_pos = self.set(run).positions
        attention = self.env[layer.attention]
        new = self.call(vlm.attention.default, q, k, v, mask, q_pos, k_pos, rest[0], plain, *rest[2:])
        self.typed[new] = run
        self.memo[attention, run] = new
        stream.changed = True
        done = self.value(exit, run)
        stream.full, stream.part = (done, None) if run == All else (joined or stream.full, (run, done))
        self.typed[done] = run
        self._expose(layer, exit)

    def _is_output(self, user: Node) -> bool:
        return user is self.output

    def _expose(self, layer: Layer, exit: Node) -> None:
        """Give readers of the stream outside the layers (the final norm, requested hidden states) the joined one."""
        outside = [u for u in exit.users if u not in self.regions and u in self.originals]
        last = layer.index == len(self.old.layers) - 1
        readers = [u for u in outside if last or u is self.output]
        if readers:
            self.stream.views = {}
            joined = self._joined()
            exit.replace_all_uses_with(joined, delete_user_cb=lambda u: u in readers)

    def _finish(self, selections: list[Selection]) -> None:
        with self.graph.inserting_before(self.output):
            self.output.args = ((self.output.args[0], tuple(self.chosen[s] for s in selections)),)
        for node in list(self.graph.nodes):
            if node.target is torch.ops.aten._assert_scalar.default:
                self.graph.erase_node(node)  # the host has compared the number of tokens and features
        self.graph.eliminate_dead_code(is_impure_node=tokenwise.writes)
        self.graph.lint()
        self.gm.recompile()
