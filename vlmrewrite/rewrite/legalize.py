"""Legalize: the one generic rewrite from a plan to a graph, for every technique and every combination of them.

Each layer's nodes are instantiated for the token sets they are needed on: the query slice and what follows the
attention for the set the layer runs on, the key and value slices for the set it attends to. At a layer's entry, in this
order: branches rejoin, selections are made, edits are done, branches leave.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import Node

from vlmrewrite import analysis
from vlmrewrite.analysis import Anatomy, Layer, value, where
from vlmrewrite.plan import (
    All,
    Branch,
    Chooser,
    Edit,
    Extra,
    Last,
    LayerPlan,
    Plan,
    Selection,
    Text,
    TokenSet,
    Vision,
    difference,
    layer_index,
    union,
)
from vlmrewrite.rewrite.stream import Stream, StreamEmitter

BLOCKS = "vlm_blocks"
"""Where a rewritten graph finds the plan's blocks."""

vlm = torch.ops.vlm


@dataclass
class Rewritten:
    """A rewritten graph.

    Attributes:
        graph_module: captured inputs, then ``extras``; returns (captured outputs, chosen bool [F] of each selection).
        extras: its additional inputs, in order.
        selections: what the second output holds, in order.
        typed: token set of each instantiated node, for verification.
        frontier: where a dispatch parts from its other variants: what the chooser reads, then the stream; else empty.
    """

    graph_module: torch.fx.GraphModule
    extras: tuple[Extra, ...]
    selections: tuple[Selection, ...]
    typed: dict[Node, TokenSet]
    frontier: tuple[Node, ...] = ()


def legalize(
    gm: torch.fx.GraphModule,
    anatomy: Anatomy,
    plan: Plan,
    blocks: nn.ModuleDict | None = None,
    parameters: Mapping[str, tuple[int, str]] | None = None,
) -> Rewritten:
    """Rewrite a copy of a captured graph so that it does what the plan says; the given graph is not changed.

    Args:
        gm, anatomy, plan: the graph, its anatomy and the plan.
        blocks: the modules of the plan's blocks, by name; the rewritten graph reads their parameters.
        parameters: for each graph input that is a decoder layer's parameter, the layer and the name within it.

    Raises:
        ValueError: a node inside a layer cannot be computed on a subset of the tokens; the message names it.
    """
    plan.check()
    return _Legalizer(gm, anatomy, plan, blocks or nn.ModuleDict(), parameters or {}).run()


def with_blocks(gm: torch.fx.GraphModule, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A module of another graph; the blocks in it are the same ones, not copies: they are trained, moved and loaded."""
    graph.lint()
    made = torch.fx.GraphModule(gm, graph)
    if hasattr(gm, BLOCKS):
        setattr(made, BLOCKS, getattr(gm, BLOCKS))
    return made


class _Legalizer(StreamEmitter):
    def __init__(
        self,
        gm: torch.fx.GraphModule,
        anatomy: Anatomy,
        plan: Plan,
        blocks: nn.ModuleDict,
        parameters: Mapping[str, tuple[int, str]],
    ) -> None:
        super().__init__(gm, anatomy)
        self.plan, self.blocks, self.parameters = plan, blocks, parameters
        self.regions = {self.env[n] for layer in anatomy.layers for n in layer.region}
        self.originals = set(self.graph.nodes)
        self.past = anatomy.layers[0].append is not None and anatomy.layers[0].append.args[0] is not None
        self.away: dict[Branch, Node] = {}
        self.frontier: tuple[Node, ...] = ()

    def run(self) -> Rewritten:
        selections = self.plan.selections()
        for layer, entry in zip(self.old.layers, self.plan.layers, strict=True):
            self.enter(layer)
            if self.plan.chooser is not None and layer.index == layer_index(self.plan.chooser.at, self.plan.depth):
                self.frontier = self._part(self.plan.chooser)
            for branch in self.plan.branches:
                if branch.leave < layer.index:
                    self._rejoin(branch, layer.index)
            for s in (s for s in selections if s.at == layer.index):
                self._choose(s)
            for edit in (e for e in self.plan.edits if e.at == layer.index):
                self._edit(edit)
            for branch in (b for b in self.plan.branches if b.leave == layer.index):
                self.away[branch] = self._through(branch)
                self._rejoin(branch, layer.index)
            self._rewrite(layer, entry)
            self._expose(layer)
        self._finish(selections)
        return Rewritten(self.gm, tuple(self.extras), tuple(selections), self.typed, self.frontier)

    # ---- at a layer's entry

    def _choose(self, s: Selection) -> None:
        supply = self._supply(s.source)
        inputs = [supply[need]() for need in s.policy.needs]
        given = self.which(s.source), self.extra("lengths"), self.extra("keep", s)
        chosen = self.call(s.policy.op, *inputs, *given, *map(self._weight, s.policy.weights), *s.policy.options)
        self.chosen[s] = self.call(vlm.checked.default, chosen, *given, s.policy.name)

    def _edit(self, edit: Edit) -> None:
        supply, s = self._supply(edit.tokens), self.set(edit.tokens)
        inputs = [supply[need]() for need in edit.needs]
        x = self.view(edit.tokens)
        new = self.call(edit.op, x, s.index, s.valid, *inputs, *map(self._weight, edit.weights), *edit.options)
        new.meta["edit"] = edit.name
        self.write(edit.tokens, new)

    def _supply(self, tokens: TokenSet) -> dict[str, Callable[[], Node]]:
        """The inputs that a policy or an edit can ask for."""
        return {
            "features": self._features,
            "encoder_features": lambda: self.extra("encoder_features"),
            "ordinal": lambda: self.extra("ordinals"),
            "attention": lambda: self._attention(union(Text, tokens)),
            "attention_outside": lambda: self._attention(union(Text, difference(Vision, tokens))),
            "stream": self.joined,
            "text": lambda: self.extra("text"),
            "prompt": self._prompt,
            "flat": lambda: self.extra("flat"),
            "lengths": lambda: self.extra("lengths"),
            "grid": lambda: self.extra("grid"),
        }

    def _weight(self, name: str) -> Node:
        """A block's parameter."""
        with self.graph.inserting_before(self.anchor):
            return self.graph.create_node("get_attr", f"{BLOCKS}.{name}")

    def _features(self) -> Node:
        node = self.env[self.old.merged_features]
        x = value(self.old.merged_features)
        assert isinstance(x, Tensor)
        return node if x.dim() == 2 else self.call(torch.flatten, node, 0, x.dim() - 2)

    def _prompt(self) -> Node:
        before = self.call(operator.le, self.extra("everywhere"), self.extra("last"))
        return self.call(operator.and_, self.extra("text"), before)

    def _attention(self, current: TokenSet) -> Node:
        """What the last prompt token pays to each vision token in this layer, scored outside of it."""
        layer, append, now = self.layer, self.layer.append, self.set(current)
        q = self.value(self.old_arg(layer.attention, 0), Last)
        k = self.value(self.old_arg(append, 3) if append is not None else self.old_arg(layer.attention, 1), current)
        positions = now.positions
        if self.past:
            assert append is not None
            k = self.call(torch.cat, [self.old_arg(append, 0), k], 2)
            positions = self.call(torch.cat, [self.old_arg(append, 2), positions], 1)
        mask, scale, softcap = self.maybe(layer.attention.args[3]), layer.attention.args[6], layer.attention.args[8]
        return self.call(
            vlm.attention_received.default, q, k, mask, self.set(Last).positions, positions, scale, softcap,
            now.index, now.valid, self.extra("flat"), self.extra("length"),
        )  # fmt: skip

    def _part(self, chooser: Chooser) -> tuple[Node, ...]:
        """What the chooser reads, and the stream as it is."""
        stream = self.stream
        here = (stream.full,) if stream.part is None else (stream.full, stream.part[1])
        away = tuple(self.away[b] for b in self.plan.branches if b in self.away and b.rejoin >= self.layer.index)
        if chooser.op is None:
            return (*here, *away)
        read = self.call(chooser.op, self.view(Last), *map(self._weight, chooser.weights))
        return (read, *here, *away)

    # ---- branches

    def _through(self, branch: Branch) -> Node:
        """The branch's tokens behind its block: what its layer does, with the block's parameters, among themselves."""
        x = self.view(branch.tokens)
        if branch.block is None:
            return x
        around = self.layer, self.stream
        layer = self.old.layers[branch.layer]
        self.swap(self._parameters(branch, layer))
        self.stream = Stream(x, changed=True)
        self.enter(layer)
        self.stream.views[branch.tokens] = x
        k, v = (self.value(self._new_key(layer, i), branch.tokens) for i in (0, 1))
        self._attend(layer, branch.tokens, branch.tokens, k, v, self.set(branch.tokens).positions)
        done = self.value(self.env[layer.exit], branch.tokens)
        self.swap({})
        self.layer, self.stream = around
        views = self.stream.views
        self.enter(self.layer)
        self.stream.views = views
        return done

    def _parameters(self, branch: Branch, layer: Layer) -> dict[Node, Node]:
        found = {}
        for node in self.old_inputs():
            of, name = self.parameters.get(node.name, (-1, ""))
            if of == layer.index:
                found[self.env[node]] = self._weight(f"{branch.block}.{name}")
        if not found:
            raise ValueError(
                f"no parameter of layer {layer.index} was found among the graph's inputs, so that block"
                f" {branch.block!r} cannot take their place"
            )
        return found

    def old_inputs(self) -> list[Node]:
        """The captured graph's inputs."""
        return [n for n in self.env if n.op == "placeholder"]

    def _rejoin(self, branch: Branch, at: int) -> None:
        if branch.rejoin == at:
            s = self.set(branch.tokens)
            new = self.call(vlm.restore.default, self.joined(), self.away[branch], s.index, s.valid)
            self.typed[new] = All
            self.stream.become(new)

    # ---- a layer

    def _new_key(self, layer: Layer, i: int) -> Node:
        """The layer's own new keys (0) or values (1), before the cache."""
        append = layer.append
        return self.old_arg(append, 3 + i) if append is not None else self.old_arg(layer.attention, 1 + i)

    def _rewrite(self, layer: Layer, entry: LayerPlan) -> None:
        run, keys, mlp = entry.sets()
        stream, exit = self.stream, self.env[layer.exit]
        if run == keys == mlp == All and not stream.changed and not self.past:
            stream.full = exit
            return
        k, v = (self.value(self._new_key(layer, i), keys) for i in (0, 1))
        k_pos = self.set(keys).positions
        append = layer.append
        if append is not None:
            old = [self.maybe(append.args[i]) for i in range(3)]
            grown = self.call(vlm.kv_append.default, *old, k, v, k_pos)
            k, v, k_pos = (self.call(operator.getitem, grown, i) for i in range(3))
            for user in list(self.env[append].users):
                if user.target is operator.getitem:
                    user.replace_all_uses_with((k, v, k_pos)[int(user.args[1])], delete_user_cb=self._is_output)  # type: ignore[arg-type]
        stream.changed = True
        self._attend(layer, run, keys, k, v, k_pos)
        if run == mlp:
            self.write(run, self.value(exit, run))
            return
        if layer.middle is None:
            raise ValueError(
                f"layer {layer.index} has no residual add between its attention and its MLP, at {where(layer.exit)}:"
                f" its MLP cannot run on {mlp} while its attention runs on {run}"
            )
        self.write(run, self.value(self.env[layer.middle], run))
        self.enter(layer, layer.second_half(), layer.middle)
        self.write(mlp, self.value(exit, mlp))

    def _attend(self, layer: Layer, run: TokenSet, keys: TokenSet, k: Node, v: Node, k_pos: Node) -> None:
        """The layer's attention node for the queries of one set and the keys of another."""
        old = layer.attention
        mask = self.maybe(old.args[3])
        alone = not self.past or bool(self.swapped)
        plain: Any = self.extra("dense", run) if alone and mask is None and run == keys else False
        q = self.value(self.old_arg(old, 0), run)
        rest = [self.maybe(a) for a in old.args[6:]]
        q_pos = self.set(run).positions
        new = self.call(vlm.attention.default, q, k, v, mask, q_pos, k_pos, rest[0], plain, *rest[2:])
        self.instead(self.env[old], run, new)

    def _is_output(self, user: Node) -> bool:
        return user is self.output

    def _expose(self, layer: Layer) -> None:
        """Give readers of the stream outside the layers (the final norm, requested hidden states) the joined one."""
        last = layer.index == len(self.old.layers) - 1
        for branch in self.plan.branches if last else ():
            self._rejoin(branch, layer.index + 1)
        if not self.stream.changed:
            return
        exit = self.env[layer.exit]
        outside = [u for u in exit.users if u not in self.regions and u in self.originals]
        readers = [u for u in outside if last or u is self.output]
        if readers:
            joined = self.joined()
            exit.replace_all_uses_with(joined, delete_user_cb=lambda u: u in readers)

    def _finish(self, selections: list[Selection]) -> None:
        with self.graph.inserting_before(self.output):
            self.output.args = ((self.output.args[0], tuple(self.chosen[s] for s in selections)),)
        for node in list(self.graph.nodes):
            if node.target is torch.ops.aten._assert_scalar.default:
                self.graph.erase_node(node)  # the host has compared the number of tokens and features
        if len(self.blocks):
            setattr(self.gm, BLOCKS, self.blocks)
        self.graph.eliminate_dead_code(is_impure_node=lambda n: n in self.frontier or analysis.writes(n))
        self.graph.lint()
        self.gm.recompile()
