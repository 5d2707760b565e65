"""Spare room behind a layer's keys and values.

A token is appended without copying those before it, unless these are so few that copying takes less time. A layer
makes a buffer when it first appends to more, with room for a share of what it holds; where none is left it makes
another. So the memory of a cache that grows is at most an eighth more than its tokens need (8 tokens, if that is more),
of which one layer's is there twice while it moves; and a token that stays is copied some nine times in all, not once a
step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmrewrite.compat import memory_is_shared

SHARE, LEAST = 8, 8
"""Buffer is made for an eighth more tokens than there are, and for at least 8 more."""


class Buffer:
    """Memory of a layer for more tokens than it holds; only for tensors that no gradient is recorded for.

    A buffer never moves. It is made by copying, never around tensors that came from elsewhere, and it is an ordinary
    tensor in inference mode too, so that it can be written to after it.

    Attributes:
        keys, values: [B, Hk, capacity, D] and [B, Hk, capacity, Dv], contiguous.
        shown: the first tokens of both, what the layer holds. A layer that holds other tensors has no buffer.
        written: how many tokens somebody may have been shown; after a crop more than are shown now.
    """

    def __init__(self, keys: Tensor, values: Tensor, more: int, room: int = 0, rows: Tensor | None = None) -> None:
        """Copy keys and values (of some rows) to where ``more`` tokens, and ``room`` or some to spare, can follow."""
        batch, n = keys.shape[0] if rows is None else len(rows), keys.shape[2]
        capacity = n + room + 1 if room >= more else n + more + max(LEAST, (n + more) // SHARE)
        with torch.inference_mode(False):
            self.keys, self.values = (x.new_empty(batch, x.shape[1], capacity, x.shape[3]) for x in (keys, values))
        self.written = 0
        for new, old in zip(self.show(n), (keys, values), strict=True):
            if rows is None:
                new.copy_(old)
            else:
                torch.index_select(old, 0, rows, out=new)

    def show(self, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` tokens, which the layer holds from now on."""
        self.written = max(self.written, n)
        # .data: no views to autograd, which would take each append for a change of what was shown before, nor to
        # Dynamo, which would guard the buffer's shape too.
        self.shown = self.keys.narrow(2, 0, n).data, self.values.narrow(2, 0, n).data
        return self.shown

    def takes(self, more: int) -> bool:
        """Whether ``more`` tokens can be written after those shown, in sight of nobody, and one slot stay free.

        (Were all slots in use, the strides of what is shown would be those of a tensor without spare room, and a
        compiler would compile for it anew.)
        """
        n = self.shown[0].shape[2]
        if n < self.written and not any(memory_is_shared(x, 2) for x in (self.keys, self.values)):
            self.written = n
        mine = torch.is_inference_mode_enabled() or not self.keys.is_inference()  # and not a copy made in that mode
        return mine and n >= self.written and n + more < self.keys.shape[2]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k [B, Hk, t, D] and v [B, Hk, t, Dv] after what is shown; :meth:`takes` said that they fit."""
        n, t = self.shown[0].shape[2], k.shape[2]
        self.keys.narrow(2, n, t).copy_(k)
        self.values.narrow(2, n, t).copy_(v)
        return self.show(n + t)
