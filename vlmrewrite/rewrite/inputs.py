"""What policies and edits ask for, made in the graph; see :class:`vlmrewrite.plan.needs.Inputs`."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from vlmrewrite.analysis import Anatomy, value
from vlmrewrite.plan import NEEDS, Last, TokenSet
from vlmrewrite.rewrite.layer import LayerNodes
from vlmrewrite.rewrite.sets import Emitter, Sets


@dataclass(frozen=True)
class GraphInputs:
    """At the entry of the layer at hand, for a policy's source or an edit's tokens."""

    tokens: TokenSet
    anatomy: Anatomy
    nodes: LayerNodes
    emit: Emitter
    sets: Sets

    def fact(self, name: str) -> Node:
        """An input of the graph."""
        return self.emit.extra(name)

    def features(self) -> Node:
        """As the merge takes them, [F, C]."""
        node, x = self.nodes.env[self.anatomy.merged_features], value(self.anatomy.merged_features)
        assert isinstance(x, Tensor)
        return node if x.dim() == 2 else self.emit.call(torch.flatten, node, 0, x.dim() - 2)

    def stream(self) -> Node:
        """The whole stream, up to date."""
        return self.nodes.stream.joined()

    def prompt(self) -> Node:
        """Text up to the last prompt token."""
        before = self.emit.call(operator.le, self.emit.extra("everywhere"), self.emit.extra("last"))
        return self.emit.call(operator.and_, self.emit.extra("text"), before)

    def attention(self, outside: bool) -> Node:
        """Scored outside of the layer's own attention."""
        scores = NEEDS["attention_outside" if outside else "attention"].scores
        assert scores is not None
        keys, nodes = scores(self.tokens), self.nodes
        layer, now = nodes.layer, self.sets[keys]
        q, k, positions = nodes.value(nodes.argument(layer.attention, 0), Last), nodes.new_key(0, keys), now.positions
        if nodes.past:
            k = self.emit.call(torch.cat, [nodes.argument(layer.append, 0), k], 2)
            positions = self.emit.call(torch.cat, [nodes.argument(layer.append, 2), positions], 1)
        mask, scale, softcap = (nodes.maybe(layer.attention.args[i]) for i in (3, 6, 8))
        return self.emit.call(
            torch.ops.vlm.attention_received.default, q, k, mask, self.sets[Last].positions, positions, scale, softcap,
            now.index, now.valid, self.emit.extra("flat"), self.emit.extra("length"),
        )  # fmt: skip
