"""Legalize: the one generic rewrite from a plan to a graph, for every technique and every combination of them.

Each layer's nodes are instantiated for the token sets they are needed on: the query slice and what follows the
attention for the set the layer runs on, the key and value slices for the set it attends to. At a layer's entry, in this
order: branches rejoin, selections are made, edits are done, branches leave.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch import nn
from torch.fx import Node
from torch.fx.node import map_arg

from vlmrewrite.analysis import Anatomy, Layer, hidden_write, reachable, where, writes
from vlmrewrite.compat import assert_scalar
from vlmrewrite.ops import TOKENS
from vlmrewrite.plan import NEEDS, All, Branch, Edit, Extra, Last, LayerPlan, Plan, Selection, TokenSet
from vlmrewrite.rewrite.layer import GraphInputs, LayerNodes
from vlmrewrite.rewrite.packed import packed_maps, unpacked
from vlmrewrite.rewrite.sets import BLOCKS, Emitter, Sets, Stream

vlm = torch.ops.vlm

Named = Mapping[str, tuple[int, str]]


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
    parameters: Named | None = None,
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
    work = _Rewrite(gm, anatomy, parameters or {}, blocks or nn.ModuleDict())
    selections = plan.selections()
    for layer, entry in zip(anatomy.layers, plan.layers, strict=True):
        at = layer.index
        work.arrive(layer)
        work.nodes.enter(layer)
        if plan.chooser is not None and at == plan.parts_at:
            work.part(plan)
        for branch in (b for b in plan.branches if b.leave < at == b.rejoin):
            work.rejoin(branch)
        for s in (s for s in selections if s.at == at):
            work.choose(s)
        for edit in (e for e in plan.edits if e.at == at):
            work.edit(edit)
        for branch in (b for b in plan.branches if b.leave == at):
            work.leave(branch)
        work.rewrite(layer, entry)
        for branch in (b for b in plan.branches if b.rejoin == at + 1 == len(anatomy.layers)):
            work.rejoin(branch)
        work.expose(layer)
    work.finish(selections)
    return Rewritten(work.gm, tuple(work.emit.extras), tuple(selections), work.emit.typed, work.frontier)


def with_blocks(gm: torch.fx.GraphModule, graph: torch.fx.Graph) -> torch.fx.GraphModule:
    """A module of another graph; the blocks in it are the same ones, not copies: they are trained, moved and loaded."""
    graph.lint()
    made = torch.fx.GraphModule(gm, graph)
    if hasattr(gm, BLOCKS):
        setattr(made, BLOCKS, getattr(gm, BLOCKS))
    return made


class _Rewrite:
    """The copy of a captured graph that is rewritten: one method for each thing that can happen to it."""

    def __init__(self, gm: torch.fx.GraphModule, anatomy: Anatomy, named: Named, blocks: nn.ModuleDict) -> None:
        graph, env = torch.fx.Graph(), dict[Node, Node]()
        self.output = graph.output(graph.graph_copy(gm.graph, env))
        self.gm, self.anatomy, self._blocks = torch.fx.GraphModule(gm, graph), anatomy, blocks
        self.emit = Emitter(graph, env[anatomy.layers[-1].exit].next)
        self.sets = Sets(self.emit, *(env[merge.mask] for merge in anatomy.merges))
        self.stream = Stream(env[anatomy.layers[0].entry], self.emit, self.sets, anatomy.states)
        self.nodes = LayerNodes(anatomy, env, self.emit, self.sets, self.stream)
        self._parameters = {env[n]: named[n.name] for n in env if n.op == "placeholder" and n.name in named}
        inside = [*(layer.region for layer in anatomy.layers), *anatomy.between.values()]
        self._outside = set(graph.nodes) - {env[n] for nodes in inside for n in nodes}
        self._replaced: dict[Node, int] = {}
        self._away: dict[Branch, Node] = {}
        self.frontier: tuple[Node, ...] = ()

    # ---- at a layer's entry

    def arrive(self, layer: Layer) -> None:
        """Do what stands between the layer before and this one, for all tokens."""
        between, entry = self.anatomy.between.get(layer.index), self.nodes.env[layer.entry]
        if between is None:
            return
        if not self.stream.changed:
            self.stream.full = entry
            return
        before = self.anatomy.layers[layer.index - 1]
        self._replaced |= {self.nodes.env[n]: before.index for n in between - {before.exit}}
        self.nodes.enter(before, between, before.exit)
        self.stream.write(All, self.nodes.value(entry, All))

    def part(self, plan: Plan) -> None:
        """Remember what a dispatch's chooser reads, and the stream as it is, with what is away from it."""
        assert plan.chooser is not None
        away = (self._away[b] for b in plan.branches if b in self._away and b.rejoin >= self.nodes.layer.index)
        self.frontier = (*self.stream.nodes(), *away)
        if plan.chooser.op is not None:
            read = self.emit.call(plan.chooser.op, self.stream.one(Last), *self._weights(plan.chooser))
            self.frontier = (read, *self.frontier)

    def choose(self, s: Selection) -> None:
        """Let a selection's policy choose."""
        given = self.sets.which(s.source), self.emit.extra("lengths", per=s.per), self.emit.extra("keep", s, s.per)
        inputs = self._inputs(s.policy.needs, s.source, s.per)
        inputs += [*given, *self._weights(s.policy)]
        chosen = self.emit.call(s.policy.op, *inputs, *s.policy.options, along=TOKENS)
        chosen.meta["asked_by"] = f"policy {s.policy.name!r} at layer {s.at}"
        self.sets.chosen[s] = self.emit.call(vlm.checked.default, chosen, *given, s.policy.name, along=TOKENS)

    def edit(self, edit: Edit) -> None:
        """Replace the hidden states of an edit's tokens."""
        inputs, s = self._inputs(edit.needs, edit.tokens, "frame"), self.sets[edit.tokens]
        x = self.stream.one(edit.tokens)
        new = self.emit.call(edit.op, x, s.index, s.valid, *inputs, *self._weights(edit), *edit.options)
        new.meta["asked_by"] = f"edit {edit.name!r} at layer {edit.at}"
        self.stream.write(edit.tokens, new)

    def _inputs(self, needs: tuple[str, ...], tokens: TokenSet, per: str) -> list[Node]:
        return [NEEDS[need].make(GraphInputs(tokens, self.nodes, per)) for need in needs]

    def _weights(self, of: Any) -> list[Node]:
        return [self.emit.weight(name) for name in of.weights]

    # ---- branches

    def leave(self, branch: Branch) -> None:
        """Take a branch's tokens through its block: what its layer does, with its parameters, among themselves."""
        x, tokens, layer = self.stream.view(branch.tokens), branch.tokens, self.anatomy.layers[branch.layer]
        if branch.block is not None:
            own = {n: name for n, (of, name) in self._parameters.items() if of == layer.index}
            early, late, left = packed_maps(layer, own, branch.block, self._blocks[branch.block])
            swapped = {n: self.emit.weight(f"{branch.block}.{name}") for n, name in left.items()}
            with self.nodes.aside(layer, swapped, tokens, x):
                unpacked(self.nodes, branch, early)
                self._mix(tokens, tokens, None)
                unpacked(self.nodes, branch, late)
                x = self.nodes.value(self.nodes.env[layer.exit], tokens)
        self._away[branch] = x
        if branch.rejoin == branch.leave:
            self.rejoin(branch)

    def rejoin(self, branch: Branch) -> None:
        """Put a branch's tokens back into the stream."""
        self.stream.write(All, self.stream.restored(self.stream.joined(), self._away[branch], branch.tokens))

    # ---- a layer

    def rewrite(self, layer: Layer, entry: LayerPlan) -> None:
        """Compute a layer for the tokens that it runs on."""
        run, keys, mlp = entry.sets()
        nodes, exit = self.nodes, self.nodes.env[layer.exit]
        if run == keys == mlp == All and not self.stream.changed and not nodes.past:
            self.stream.full = exit
            return
        self._replaced |= {nodes.env[n]: layer.index for n in layer.region - {layer.entry}}
        self._mix(run, keys, layer.append if not layer.keyless else layer.attention)
        if run == mlp:
            self.stream.write(run, nodes.value(exit, run))
            return
        if layer.middle is None:
            raise ValueError(
                f"layer {layer.index} is not an attention and an MLP with a residual add behind each, at"
                f" {where(layer.exit)}: its MLP cannot run on {mlp} while its attention runs on {run}"
            )
        self.stream.write(run, nodes.value(nodes.env[layer.middle], run))
        nodes.enter(layer, layer.second_half(), layer.middle)
        self.stream.write(mlp, nodes.value(exit, mlp))

    def _mix(self, run: TokenSet, keys: TokenSet, cached: Node | None) -> None:
        """The layer's attention, or its recurrence; ``cached``: the node whose results the cache keeps, or None."""
        if self.nodes.layer.keyless:
            self._recur(run, cached)
            return
        nodes, owner = self.nodes, self.nodes.layer.owner
        if owner in nodes.made and not nodes.away:
            seen = nodes.made[owner][2]
        else:
            new = [nodes.new_key(i, keys) for i in range(2)]
            seen = [*new, self.sets[keys].positions]
            if cached is not None and owner == nodes.layer.index:
                old = [nodes.maybe(cached.args[i]) for i in range(3)]
                seen = self._kept(cached, self.emit.call(vlm.kv_append.default, *old, *seen), 3)
            if not nodes.away:
                nodes.made[owner] = keys, new, seen
        self.stream.changed = True
        self._attend(run, keys, *seen)

    def _kept(self, cached: Node, new: Node, n: int) -> list[Node]:
        """The results of a node, in place of a captured one's also for who else read those."""
        parts = [self.emit.call(operator.getitem, new, i) for i in range(n)]
        for user in list(self.nodes.env[cached].users):
            if user.target is operator.getitem:
                part = parts[int(user.args[1])]  # type: ignore[arg-type]
                user.replace_all_uses_with(part, delete_user_cb=lambda reader: reader is self.output)
        return parts

    def _recur(self, run: TokenSet, cached: Node | None) -> None:
        """The layer's recurrent node for the tokens of one set, on what the cache holds, or on nothing."""
        nodes, old = self.nodes, self.nodes.layer.attention
        given: Any = map_arg(old.args, nodes.env.__getitem__)
        hidden, mask, states, weights, mixer, plain = given
        x, weights = nodes.value(hidden, run), [nodes.value(w, run) for w in weights]
        if run != All:
            mask, plain = self.sets[run].valid, self.emit.extra("dense", run)
        new = self.emit.call(vlm.recurrent.default, x, mask, [] if cached is None else states, weights, mixer, plain)
        if cached is not None:
            self._kept(cached, new, len(nodes.env[cached].users))
        self.stream.changed = True
        nodes.instead(nodes.env[old], run, new)

    def _attend(self, run: TokenSet, keys: TokenSet, k: Node, v: Node, k_pos: Node) -> None:
        """The layer's attention node for the queries of one set and the keys of another."""
        nodes, old, (k, v) = self.nodes, self.nodes.layer.attention, self.nodes.expanded(keys, k, v)
        mask, scale = nodes.maybe(old.args[3]), nodes.maybe(old.args[6])
        rest: Any = map_arg(old.args[8:], lambda n: nodes.value(nodes.env[n], run))
        plain: Any = nodes.alone and mask is None and run == keys and self.emit.extra("dense", run)
        q, q_pos = nodes.value(nodes.argument(old, 0), run), self.sets[run].positions
        new = self.emit.call(old.target, q, k, v, mask, q_pos, k_pos, scale, plain, *rest)
        nodes.instead(nodes.env[old], run, new)

    def expose(self, layer: Layer) -> None:
        """Give readers of the stream outside the layers (the final norm, hooks that keep it) the joined one."""
        exit, anchor = self.nodes.env[layer.exit], self.emit.anchor
        readers = self._outside & exit.users.keys()
        if not self.stream.changed or not readers:
            return
        early = sorted(n for n in reachable(readers) if n < anchor)
        for node in early:
            if reason := hidden_write(node):
                raise ValueError(f"a hook behind layer {layer.index} cannot read the stream, {where(node)}: {reason}")
        exit.replace_all_uses_with(self.stream.joined(), delete_user_cb=readers.__contains__)
        for node in early:
            anchor.prepend(node)

    def finish(self, selections: list[Selection]) -> None:
        """Return what the selections chose too, and drop what nobody reads."""
        graph = self.emit.graph
        if self._blocks:
            setattr(self.gm, BLOCKS, self._blocks)
        self.output.args = ((self.output.args[0], tuple(self.sets.chosen[s] for s in selections)),)
        for node in graph.find_nodes(op="call_function", target=assert_scalar()):
            graph.erase_node(node)  # the host has compared the number of tokens and features
        graph.eliminate_dead_code(is_impure_node=lambda n: n in self.frontier or writes(n))
        for node in (n for n in graph.nodes if n in self._replaced and self._outside & n.users.keys()):
            raise ValueError(
                f"layer {self._replaced[node]} is rewritten, and {where(node)} in it is read by a hook, or returned:"
                " expected hooks that read what goes into and comes out of whole layers, or none"
            )
        self.gm.recompile()
