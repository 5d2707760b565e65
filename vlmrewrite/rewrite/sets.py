"""Token sets in a graph: each set's index and validity once, and the host's inputs that they need."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from vlmrewrite.plan import All, Extra, Image, Last, Nothing, Pair, Text, TokenSet, Vision

BLOCKS = "vlm_blocks"
"""Where a rewritten graph finds the plan's blocks."""

vlm = torch.ops.vlm


class Emitter:
    """Adds nodes before an anchor, and inputs behind the graph's own.

    Args:
        graph: the graph to add to.
        anchor: where new nodes go.
    """

    def __init__(self, graph: torch.fx.Graph, anchor: Node) -> None:
        self.graph, self.anchor = graph, anchor
        self.extras: dict[Extra, Node] = {}
        self._last_input = graph.find_nodes(op="placeholder")[-1]

    def call(self, target: Any, *args: Any) -> Node:
        """A new node before the anchor."""
        with self.graph.inserting_before(self.anchor):
            return self.graph.call_function(target, args)

    def weight(self, name: str) -> Node:
        """A block's parameter, ``block.parameter``."""
        with self.graph.inserting_before(self.anchor):
            return self.graph.create_node("get_attr", f"{BLOCKS}.{name}")

    def extra(self, kind: str, subject: TokenSet | None = None) -> Node:
        """An input that the host fills in; see :class:`Extra`."""
        key = Extra(kind, subject)
        if key not in self.extras:
            with self.graph.inserting_after(self._last_input):
                self._last_input = self.graph.placeholder(f"vlm_{kind}_{len(self.extras)}")
            self.extras[key] = self._last_input
        return self.extras[key]


@dataclass
class SetNodes:
    """Index, validity and logical positions of a token set, [B, n] each."""

    index: Node
    valid: Node
    positions: Node


class Sets:
    """The token sets of a rewritten graph.

    Args:
        emit: adds what they need.
        vision: the node that computes the vision-token mask, bool [B, T].

    Attributes:
        chosen: vision sets as bool [F]; legalize adds what selections choose.
    """

    def __init__(self, emit: Emitter, vision: Node) -> None:
        self._emit, self._vision = emit, vision
        self._nodes: dict[TokenSet, SetNodes] = {}
        self.chosen: dict[TokenSet, Node] = {}

    def __getitem__(self, s: TokenSet) -> SetNodes:
        """Index, validity and positions of a set, computed once."""
        if s not in self._nodes:
            emit = self._emit
            past = emit.extra("past")
            if s in (Last, All):
                name = "last" if s == Last else "everywhere"
                index, valid = emit.extra(name), emit.extra(f"{name}_valid")
            else:
                member = emit.call(vlm.member.default, *self._membership(s))
                both = emit.call(vlm.token_index.default, member, emit.extra("padding"), emit.extra("size", s))
                index, valid = (emit.call(operator.getitem, both, i) for i in range(2))
            self._nodes[s] = SetNodes(index, valid, emit.call(vlm.positions.default, index, valid, past))
        return self._nodes[s]

    def _membership(self, s: TokenSet) -> tuple[Node | None, Node | None, Node | None]:
        """What ``vlm::member`` takes: text tokens, vision mask, and which vision tokens."""
        text = self._emit.extra("text") if s.text_part() == Text else None
        if s.text_part() == Last:
            raise ValueError(f"the text part of {s} is neither all text nor none")
        vision = s.vision_part()
        return (text, None, None) if vision == Nothing else (text, self._vision, self.which(vision))

    def which(self, s: TokenSet) -> Node:
        """A vision set as bool [F]."""
        if s not in self.chosen:
            emit = self._emit
            if s == Vision:
                node = emit.extra("vision_tokens")
            elif isinstance(s, Image):
                node = emit.call(operator.eq, emit.extra("image_of_token"), s.index)
            elif isinstance(s, Pair):
                left, right = self.which(s.left), self.which(s.right)
                right = emit.call(operator.invert, right) if s.symbol == "-" else right
                node = emit.call(operator.or_ if s.symbol == "|" else operator.and_, left, right)
            else:
                raise ValueError(f"{s} is not a set of vision tokens")
            self.chosen[s] = node
        return self.chosen[s]
