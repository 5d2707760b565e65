"""Layers of a fixed size, for decode steps of one token: what is compiled or recorded for one step serves all of them.

Where the length of a sequence is known, a layer's buffer has room for what is left of it, whatever the plan left in the
layer. A step is given the whole buffer, free slots included, and says by positions what is seen of it; how many tokens
went by is a tensor. So no shape, no number and no address changes from one step to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlmrewrite.compat import stays_where_it_is
from vlmrewrite.kvcache.buffer import Buffer
from vlmrewrite.kvcache.layer import PositionLayer
from vlmrewrite.ops import FREE


class FixedLayer(PositionLayer):
    """A layer's buffer in full, as a step that is being compiled gets it.

    keys [B, Hk, C, D], values [B, Hk, C, Dv], positions int64 [B, C], :data:`vlmrewrite.ops.FREE` where nothing was
    written to; ``seen`` int64 [], and ``length``, that of the whole sequence.
    """

    fixed = True

    def __init__(self, buffer: Buffer, positions: Tensor, seen: Any, length: int) -> None:
        super().__init__()
        self.keys, self.values, self.positions = buffer.keys, buffer.values, positions
        self.seen, self.length, self.is_initialized = seen, length, True

    def _next(self, key_states: Tensor) -> Tensor:
        at = torch.arange(key_states.shape[2], device=key_states.device) + self.seen
        return at.repeat(key_states.shape[0], 1)

    def took(self, keys: Tensor, values: Tensor, positions: Tensor, more: int) -> None:
        """Nothing to hold: tokens are written to where the others are; see :meth:`Fixed.advance`."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length of a mask, and where its first key is: it is over the whole sequence."""
        return self.length, 0


class Fixed:
    """All layers of a cache in full, and where each of them is filled up to.

    Attributes:
        layers: what a step is given.
    """

    def __init__(self, cache: Sequence[PositionLayer]) -> None:
        """Give each layer of a cache room for what is left of the sequence, and its positions too."""
        made: dict[tuple[int, int], Tensor] = {}
        with torch.inference_mode(False):
            self._seen = stays_where_it_is(torch.tensor(cache[0].seen, device=cache[0].keys.device))
        self.layers = list[FixedLayer]()
        self._held = list[tuple[Buffer, Tensor]]()
        for layer in cache:
            buffer, held = layer.reserve(1), layer.positions
            key = id(held), buffer.keys.shape[2]
            if key not in made:
                with torch.inference_mode(False):
                    full = stays_where_it_is(held.new_full((held.shape[0], key[1]), FREE))
                full[:, : held.shape[1]] = held
                made[key] = full
            for x in (buffer.keys, buffer.values):  # what is hidden weighs nothing, but nothing times NaN is NaN
                stays_where_it_is(x)[:, :, held.shape[1] :].zero_()
            self.layers.append(FixedLayer(buffer, made[key], self._seen, layer.length))
            self._held.append((buffer, held))
        self._next = cache[0].seen

    def still(self, cache: Sequence[PositionLayer]) -> bool:
        """Whether the layers of a cache hold what was written here, no more and no less, and have room for more."""
        return len(cache) == len(self._held) and all(
            layer.seen == self._next and layer.positions is held and layer.own() is buffer and buffer.takes(1)
            for layer, (buffer, held) in zip(cache, self._held, strict=True)
        )

    def advance(self, cache: Sequence[PositionLayer]) -> None:
        """A step has written one token: let each layer of the cache show it."""
        self._next += 1
        self._seen.add_(1)
        shown: dict[int, Tensor] = {}
        for i, (layer, fixed) in enumerate(zip(cache, self.layers, strict=True)):
            buffer = self._held[i][0]
            n = buffer.shown[0].shape[2] + 1
            full = fixed.positions
            if id(full) not in shown:
                shown[id(full)] = full.narrow(1, 0, n).data
            layer.keys, layer.values = buffer.show(n)
            layer.positions, layer.seen = shown[id(full)], self._next
            self._held[i] = buffer, layer.positions
