"""The residual stream in a graph under rewriting.

Between layers the stream is kept compact; tokens that a layer does not run on stay in the full stream, untouched.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from vlmrewrite.plan import All, TokenSet, contains
from vlmrewrite.rewrite.sets import Emitter, Sets

vlm = torch.ops.vlm


class Stream:
    """The residual stream: ``full`` [B, T, H], newer in ``part`` for the tokens of its set.

    ``views`` holds it for other sets; ``version`` tells apart what was computed before and after a change of it;
    ``typed`` notes the token set of each node.
    """

    def __init__(self, full: Node, emit: Emitter, sets: Sets, typed: dict[Node, TokenSet]) -> None:
        self.full, self.changed, self.version = full, False, 0
        self.part: tuple[TokenSet, Node] | None = None
        self.views: dict[TokenSet, Node] = {}
        self._emit, self._sets, self._typed = emit, sets, typed

    def nodes(self) -> tuple[Node, ...]:
        """Where it stands."""
        return (self.full,) if self.part is None else (self.full, self.part[1])

    def view(self, s: TokenSet) -> Node:
        """The stream at the current point, for the tokens of a set."""
        if s not in self.views:
            self.views[s] = node = self._viewed(s)
            self._typed[node] = s
        return self.views[s]

    def _viewed(self, s: TokenSet) -> Node:
        if self.part is not None and self.part[0] == s:
            return self.part[1]
        if self.part is not None and s != All and contains(self.part[0], s):
            outer, inner = (self._sets[x].index for x in (self.part[0], s))
            return self._emit.call(
                vlm.select.default, self.part[1], self._emit.call(vlm.relative_index.default, outer, inner)
            )
        whole = self.joined()
        return whole if s == All else self._emit.call(vlm.select.default, whole, self._sets[s].index)

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
        node = self._emit.call(vlm.restore.default, full, part, s.index, s.valid)
        self._typed[node] = All
        return node

    def write(self, s: TokenSet, new: Node) -> None:
        """Replace the hidden states of a set's tokens."""
        self._typed[new] = s
        if s == All:
            self.full, self.part = new, None
        else:
            same_set = self.part is not None and self.part[0] == s
            self.full, self.part = self.full if same_set else self.joined(), (s, new)
        self.changed, self.views = True, {}
        self.version += 1
