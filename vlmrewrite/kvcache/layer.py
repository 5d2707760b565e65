"""One layer's keys and values, with the logical position of each, and spare room behind them.

A token is appended without copying those before it, unless these are so few that copying takes less time. A layer
makes a buffer when it first appends to more, with room for a share of what it holds; where none is left it makes
another. So the memory of a cache that grows is at most an eighth more than its tokens need (8 tokens, if that is more),
of which one layer's is there twice while it moves; and a token that stays is copied some nine times in all, not once a
step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from vlmrewrite.compat import memory_is_shared

T = TypeVar("T")

Shared = dict[tuple[int, ...], tuple[object, Any]]
"""By the ids of some objects, a tensor of positions first: they, and what was made of them for all layers."""


def once(shared: Shared, objects: tuple[object, ...], make: Callable[[], T]) -> T:
    """What was made of these very objects; made at the first request for it."""
    key = tuple(map(id, objects))
    if (found := shared.get(key)) is None:
        found = shared[key] = objects, make()
    made: T = found[1]
    return made


SHARE, LEAST = 8, 8
"""Buffer is made for an eighth more tokens than there are, and for at least 8 more."""

SMALL = 1 << 17
"""Keys of fewer bytes are copied at each append: it takes less time than two views of a buffer."""


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


def _same_kind(x: Tensor, y: Tensor) -> bool:
    """Whether all but length and strides is the same; else, concatenation converts, or raises."""
    (batch, heads, _, size), (rows, others, _, width) = x.shape, y.shape
    return (batch, heads, size) == (rows, others, width) and x.dtype is y.dtype and x.device == y.device


class PositionLayer(DynamicLayer):
    """One layer's keys [B, Hk, m, D], values [B, Hk, m, Dv] and logical positions int64 [B, m].

    ``seen`` is the *logical* length, the tokens that went by, whatever the layer kept of them. A position of -1 is an
    empty slot; ``holes`` says that there may be some. ``shared``, where a method takes it, is filled by the first layer
    of several that hold the same tensor of positions, so that they go on to hold the same one.
    An empty layer holds None for all three. Where it is known how long the sequence gets, it is ``length``, and memory
    for what is left of it is taken at once.
    """

    keys: Any
    values: Any
    supports_early_init = False
    fixed = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.positions: Any = None
        self.buffer: Buffer | None = None
        self.seen, self.holes, self.length = 0, False, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: the first update brings the tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append k [B, Hk, t, D] and v [B, Hk, t, Dv] of the next t tokens and return all keys and values."""
        if torch.compiler.is_dynamo_compiling():
            how = (True,) if self.fixed else ()
            keys, values, positions = torch.ops.vlm.kv_append.default(
                self.keys, self.values, self.positions, key_states, value_states, self._next(key_states), *how
            )
            self.took(keys, values, positions, key_states.shape[2])
            return keys, values
        shared: Shared = kwargs.get("shared", {})
        self.positions = once(shared, (self.positions,), lambda: self._grown(key_states))
        keys, values = self._append(key_states, value_states)
        self.is_initialized = True
        self.seen += key_states.shape[2]
        return keys, values

    def took(self, keys: Tensor, values: Tensor, positions: Tensor, more: int) -> None:
        """Hold these from now on: a compiled step has appended ``more`` tokens."""
        self.keys, self.values, self.positions = keys, values, positions
        self.is_initialized = True
        self.seen += more

    def _next(self, key_states: Tensor) -> Tensor:
        at = torch.arange(self.seen, self.seen + key_states.shape[2], device=key_states.device)
        return at.repeat(key_states.shape[0], 1)  # not a view, which Dynamo would compile for anew

    def _grown(self, key_states: Tensor) -> Tensor:
        if self.positions is None:
            return self._next(key_states)
        if type(self.seen) is int and key_states.shape[2] == 1 and len(key_states) == len(self.positions):
            return F.pad(self.positions, (0, 1), value=self.seen)  # in a third of the time
        return torch.cat([self.positions, self._next(key_states)], 1)

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None:
            self.keys, self.values = k, v
        elif self._copies() or not (_same_kind(self.keys, k) and _same_kind(self.values, v)):
            self.buffer = None
            self.keys, self.values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        else:
            self.keys, self.values = self.reserve(k.shape[2]).append(k, v)
        return self.keys, self.values

    def _copies(self) -> bool:
        """Whether tokens that are appended come with a copy of all: under gradients, or where that is cheaper."""
        return torch.is_grad_enabled() or (self.buffer is None and not self.length and self.keys.nbytes < SMALL)

    def own(self) -> Buffer | None:
        """The buffer that this layer's keys and values lie in."""
        own = self.buffer is not None and self.keys is self.buffer.shown[0] and self.values is self.buffer.shown[1]
        return self.buffer if own else None

    def reserve(self, more: int) -> Buffer:
        """A buffer with room for ``more`` tokens after those held, made if there is none.

        Not where gradients are recorded.
        """
        buffer = self.own()
        if buffer is None or not buffer.takes(more):
            self.buffer = buffer = Buffer(self.keys, self.values, more, self.length - self.seen)
            self.keys, self.values = buffer.shown
        return buffer

    def release(self) -> None:
        """Lay keys and values out in one way only, without spare room."""
        self.buffer = None
        if self.keys is not None:
            self.keys, self.values = self.keys.contiguous(), self.values.contiguous()

    def nbytes(self) -> int:
        """Bytes of the keys and values held, without the spare room."""
        return 0 if self.keys is None else int(self.keys.nbytes + self.values.nbytes)

    def get_seq_length(self) -> int:
        """Logical length in tokens."""
        return self.seen

    def reset(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]

    def crop(self, tokens_to_remove: int, shared: Shared | None = None) -> None:
        """Forget the last ``-tokens_to_remove`` *logical* tokens, whether or not this layer kept them.

        Raises:
            ValueError: for a positive number (transformers' convention).
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop expects a number of tokens to remove as a negative integer, got {tokens_to_remove}")
        if tokens_to_remove == 0 or self.positions is None:
            return
        before = self.positions.shape[1]
        self.seen = max(0, self.seen + tokens_to_remove)
        self.positions, holes = once({} if shared is None else shared, (self.positions,), self._cropped)
        self.holes = self.holes or holes
        self._keep(self.positions.shape[1], before)

    def _keep(self, n: int, before: int) -> None:
        """Of the keys and values of ``before`` tokens, only the first ``n``."""
        buffer = self.own()
        self.keys, self.values = (self.keys[:, :, :n], self.values[:, :, :n]) if buffer is None else buffer.show(n)

    def _cropped(self) -> tuple[Tensor, bool]:
        left = self.positions.masked_fill(self.positions >= self.seen, -1)
        used = (left >= 0).any(0).nonzero()  # the columns that any row uses
        left = left[:, : int(used[-1]) + 1 if len(used) else 0].clone(memory_format=torch.contiguous_format)
        return left, bool((left < 0).any())

    def reorder_cache(self, beam_idx: Tensor, shared: Shared | None = None) -> None:
        """Rows of the next step come from rows ``beam_idx`` [B]."""
        self._rows(lambda rows: beam_idx.to(rows.device), shared)

    def batch_repeat_interleave(self, repeats: int, shared: Shared | None = None) -> None:
        """Repeat every row ``repeats`` times."""
        self._rows(lambda rows: rows.repeat_interleave(repeats), shared)

    def batch_select_indices(self, indices: Tensor, shared: Shared | None = None) -> None:
        """Keep only the rows ``indices``."""
        self._rows(lambda rows: rows[indices], shared)

    def _rows(self, choose: Callable[[Tensor], Tensor], shared: Shared | None) -> None:
        if self.positions is None:
            return
        positions = self.positions

        def chosen() -> tuple[Tensor, Tensor]:
            rows = choose(torch.arange(len(positions), device=positions.device))
            return rows, positions.index_select(0, rows)

        rows, self.positions = once({} if shared is None else shared, (positions,), chosen)
        self._take_rows(rows)

    def _take_rows(self, rows: Tensor) -> None:
        """Copy rows, once: to where the next tokens can follow, unless gradients are recorded."""
        rows = rows.to(self.keys.device)
        if self._copies():
            self.buffer = None
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        else:
            self.buffer = Buffer(self.keys, self.values, 1, self.length - self.seen, rows)
            self.keys, self.values = self.buffer.shown
