"""Token sets in a graph, each one's index and validity once, and the residual stream, compact for the tokens it is on.

Tokens that a layer does not run on stay in the full stream, untouched.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch.fx import Node

from vlmrewrite.analysis import ALONG
from vlmrewrite.ops import TOKENS, Along
from vlmrewrite.plan import (
    All,
    Extra,
    Frame,
    Image,
    Images,
    Last,
    Nothing,
    Pair,
    Text,
    TokenSet,
    Video,
    Videos,
    Vision,
    contains,
)

BLOCKS = "vlm_blocks"
"""Where a rewritten graph finds the plan's blocks."""

vlm = torch.ops.vlm


class Emitter:
    """Adds nodes before an anchor, and inputs behind the graph's own.

    Attributes:
        graph: the graph to add to.
        anchor: where new nodes go.
        extras: the inputs added.
        typed: the token set of each node that holds one's tokens.
    """

    def __init__(self, graph: torch.fx.Graph, anchor: Node) -> None:
        self.graph, self.anchor = graph, anchor
        self.extras: dict[Extra, Node] = {}
        self.typed: dict[Node, TokenSet] = {}
        self._last_input = graph.find_nodes(op="placeholder")[-1]

    def call(self, target: Any, *args: Any, on: TokenSet | None = None, along: Along = 0) -> Node:
        """A new node before the anchor, which holds the tokens of a set, and its rows along an axis, or TOKENS."""
        with self.graph.inserting_before(self.anchor):
            node = self.graph.call_function(target, args)
        node.meta[ALONG] = along
        if on is not None:
            self.typed[node] = on
        return node

    def weight(self, name: str) -> Node:
        """A block's parameter, ``block.parameter``."""
        with self.graph.inserting_before(self.anchor):
            return self.graph.create_node("get_attr", f"{BLOCKS}.{name}")

    def extra(self, kind: str, subject: TokenSet | None = None, per: str = "image") -> Node:
        """An input that the host fills in; see :class:`Extra`."""
        key = Extra(kind, subject, per)
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
        vision: the nodes that compute the masks of vision tokens, of images and of videos, bool [B, T].

    Attributes:
        chosen: vision sets as bool [F]; legalize adds what selections choose.
    """

    def __init__(self, emit: Emitter, *vision: Node) -> None:
        self._emit, self._masks = emit, vision
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
                if s.text_part() == Last:
                    raise ValueError(f"the text part of {s} is neither all text nor none")
                text, vision = emit.extra("text") if s.text_part() == Text else None, s.vision_part()
                parts = (None, None) if vision == Nothing else (self._vision(), self.which(vision))
                member = emit.call(vlm.member.default, text, *parts)
                both = emit.call(vlm.token_index.default, member, emit.extra("padding"), emit.extra("size", s))
                index, valid = (emit.call(operator.getitem, both, i) for i in range(2))
            self._nodes[s] = SetNodes(index, valid, emit.call(vlm.positions.default, index, valid, past))
        return self._nodes[s]

    def _vision(self) -> Node:
        """The mask of all vision tokens."""
        while len(self._masks) > 1:
            self._masks = (self._emit.call(operator.or_, *self._masks[:2]), *self._masks[2:])
        return self._masks[0]

    def which(self, s: TokenSet) -> Node:
        """A vision set as bool [F]."""
        if s not in self.chosen:
            emit = self._emit
            if s == Vision:
                node = emit.extra("vision_tokens")
            elif isinstance(s, (Image, Video)):
                number = s.index if isinstance(s, Image) else -1 - s.index
                node = emit.call(operator.eq, emit.extra("image_of_token"), number)
            elif s in (Images, Videos):
                node = emit.extra("of_videos")
                node = node if s == Videos else emit.call(operator.invert, node)
            elif isinstance(s, Frame):
                node = emit.call(operator.eq, emit.extra("frame"), s.index)
                node = emit.call(operator.and_, node, self.which(Videos))
            elif isinstance(s, Pair):
                left, right = self.which(s.left), self.which(s.right)
                right = emit.call(operator.invert, right) if s.symbol == "-" else right
                node = emit.call(operator.or_ if s.symbol == "|" else operator.and_, left, right)
            else:
                raise ValueError(f"{s} is not a set of vision tokens")
            self.chosen[s] = node
            node.meta[ALONG] = TOKENS
        return self.chosen[s]


class Stream:
    """The residual stream: ``full`` [B, T, H], or ``states`` of it, [S, B, T, H]; in ``part``, newer, a set's tokens.

    ``views`` holds it for other sets; ``version`` tells apart what was computed before and after a change of it.
    """

    def __init__(self, full: Node, emit: Emitter, sets: Sets, states: int) -> None:
        self.full, self.changed, self.version, self.states = full, False, 0, states
        self.part: tuple[TokenSet, Node] | None = None
        self.views: dict[TokenSet, Node] = {}
        self._emit, self._sets = emit, sets

    def nodes(self) -> tuple[Node, ...]:
        """Where it stands."""
        return (self.full,) if self.part is None else (self.full, self.part[1])

    def view(self, s: TokenSet) -> Node:
        """The stream at the current point, for the tokens of a set."""
        if s not in self.views:
            self.views[s] = node = self._viewed(s)
            self._emit.typed[node] = s
        return self.views[s]

    def one(self, s: TokenSet) -> Node:
        """The same, for what takes one hidden state of each token, [B, n, H]."""
        if self.states:
            raise ValueError(f"the decoder has {self.states} hidden states of each token; what reads one is refused")
        return self.view(s)

    def _viewed(self, s: TokenSet) -> Node:
        if s == All:
            return self.joined()
        index = self._sets[s].index
        if self.part is None or not contains(self.part[0], s):
            return self._of_tokens(vlm.select.default, [self.joined()], index)
        held, newer = self.part
        if held == s:
            return newer
        at = self._emit.call(vlm.relative_index.default, self._sets[held].index, index)
        return self._of_tokens(vlm.select.default, [newer], at)

    def _of_tokens(self, op: Any, streams: list[Node], *args: Node) -> Node:
        """An operator that takes streams [B, T, C]; several states of a token stand behind one another there."""
        call = self._emit.call
        if not self.states:
            return call(op, *streams, *args)
        rows = [call(torch.flatten, call(torch.movedim, x, 0, 2), 2) for x in streams]
        made = call(torch.unflatten, call(op, *rows, *args), 2, (self.states, -1))
        return call(torch.movedim, made, 2, 0, along=1)

    def joined(self) -> Node:
        """The whole stream, up to date."""
        if self.part is None:
            return self.full
        if All not in self.views:
            tokens, newer = self.part
            self.views[All] = self.restored(self.full, newer, tokens)
        return self.views[All]

    def restored(self, full: Node, part: Node, tokens: TokenSet) -> Node:
        """``full`` with ``part`` in place of some tokens."""
        s = self._sets[tokens]
        self._emit.typed[node := self._of_tokens(vlm.restore.default, [full, part], s.index, s.valid)] = All
        return node

    def write(self, s: TokenSet, new: Node) -> None:
        """Replace the hidden states of a set's tokens."""
        self._emit.typed[new] = s
        if s == All:
            self.full, self.part = new, None
        else:
            same_set = self.part is not None and self.part[0] == s
            self.full, self.part = self.full if same_set else self.joined(), (s, new)
        self.changed, self.views = True, {}
        self.version += 1
