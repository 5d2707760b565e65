"""Emitting token sets into a graph: each set's index, and the host's inputs that it needs, once."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from vlmrewrite.plan import (
    All,
    Difference,
    Extra,
    Image,
    Intersection,
    Last,
    Nothing,
    Text,
    TokenSet,
    Union,
    Vision,
    text_part,
    vision_part,
)

vlm = torch.ops.vlm


@dataclass
class SetNodes:
    """Index, validity and logical positions of a token set, [B, n] each."""

    index: Node
    valid: Node
    positions: Node


class SetEmitter:
    """Adds nodes before an anchor, and inputs behind the graph's own.

    Args:
        graph: the graph to add to.
        anchor: where new nodes go.
        vision: the node that computes the vision-token mask, bool [B, T].
    """

    def __init__(self, graph: torch.fx.Graph, anchor: Node, vision: Node) -> None:
        self.graph, self.anchor, self.vision = graph, anchor, vision
        self.extras: dict[Extra, Node] = {}
        self.sets: dict[TokenSet, SetNodes] = {}
        self.chosen: dict[TokenSet, Node] = {}
        self.last_input = [n for n in graph.nodes if n.op == "placeholder"][-1]

    def call(self, target: Any, *args: Any) -> Node:
        """A new node before the anchor."""
        with self.graph.inserting_before(self.anchor):
            return self.graph.call_function(target, args)

    def extra(self, kind: str, subject: TokenSet | None = None) -> Node:
        """An input that the host fills in; see :class:`Extra`."""
        key = Extra(kind, subject)
        if key not in self.extras:
            with self.graph.inserting_after(self.last_input):
                self.last_input = self.graph.placeholder(f"vlm_{kind}_{len(self.extras)}")
            self.extras[key] = self.last_input
        return self.extras[key]

    def size(self, s: TokenSet) -> Node:
        """The length of a set's index."""
        return self.extra("size", s)

    def set(self, s: TokenSet) -> SetNodes:
        """Index, validity and positions of a set, computed once."""
        if s not in self.sets:
            past = self.extra("past")
            if s == Last:
                index, valid = self.extra("last"), self.extra("last_valid")
            elif s == All:
                index, valid = self.extra("everywhere"), self.extra("everywhere_valid")
            else:
                member = self.call(vlm.member.default, *self.membership(s))
                both = self.call(vlm.token_index.default, member, self.extra("padding"), self.size(s))
                index, valid = self.call(operator.getitem, both, 0), self.call(operator.getitem, both, 1)
            self.sets[s] = SetNodes(index, valid, self.call(vlm.positions.default, index, valid, past))
        return self.sets[s]

    def membership(self, s: TokenSet) -> tuple[Node | None, Node | None, Node | None]:
        """What ``vlm::member`` takes: text tokens, vision mask, and which vision tokens."""
        text = self.extra("text") if text_part(s) == Text else None
        if text_part(s) == Last:
            raise ValueError(f"the text part of {s} is neither all text nor none")
        vision = vision_part(s)
        if vision == Nothing:
            return text, None, None
        return text, self.vision, self.which(vision)

    def which(self, s: TokenSet) -> Node:
        """A vision set as bool [F]."""
        if s in self.chosen:
            return self.chosen[s]
        if s == Vision:
            node = self.extra("vision_tokens")
        elif isinstance(s, Image):
            node = self.call(operator.eq, self.extra("image_of_token"), s.index)
        elif isinstance(s, Union):
            node = self.call(operator.or_, self.which(s.left), self.which(s.right))
        elif isinstance(s, Intersection):
            node = self.call(operator.and_, self.which(s.left), self.which(s.right))
        elif isinstance(s, Difference):
            node = self.call(operator.and_, self.which(s.left), self.call(operator.invert, self.which(s.right)))
        else:
            raise ValueError(f"{s} is not a set of vision tokens")
        self.chosen[s] = node
        return node
