"""One layer's keys and values, with the logical position of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from vlmrewrite.kvcache.buffer import SHARE, Buffer

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


SMALL = 1 << 17
"""Keys of fewer bytes are copied at each append: it takes less time than two views of a buffer."""

LATE = 64
"""Tokens before the window of a layer that slides that stay, so that as many can be forgotten at the end, and that wait
until there are as many (or an eighth of the window, if that is more) before they are let go."""


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
        self.window, self.since, self._looked_at = 0, 0, 0

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
            return torch.constant_pad_nd(self.positions, (0, 1), self.seen)  # in a third of the time
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

    def plainly(self, queries: int, mask: Tensor | None) -> bool:
        """Whether so many queries, the last tokens, see all keys that are not after them, and no mask says more."""
        return mask is None and not self.holes and (queries == 1 or self.positions.shape[1] == queries)

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

    def let_go(self, window: int, shared: Shared) -> None:
        """Forget tokens that no later one sees, some at a time.

        Args:
            window: how many tokens a token of this layer sees, itself included; :data:`LATE` before it stay too.
            shared: of layers with the same window.
        """
        if self.positions is None:
            return
        enough, n = max(LATE, window // SHARE), self.positions.shape[1]
        if n < max(window + LATE, self._looked_at) + enough:
            return
        since = self.seen - window - LATE + 1

        def needed() -> tuple[int, Tensor]:
            first = int((self.positions >= since).any(0).int().argmax())
            return first, self.positions[:, first:].clone(memory_format=torch.contiguous_format)

        first, left = once(shared, (self.positions,), needed)
        self._looked_at = n
        if first < enough:
            return
        keys, values, copies = self.keys[:, :, first:], self.values[:, :, first:], self._copies()
        self.buffer = None if copies else Buffer(keys, values, 1)
        self.keys, self.values = (keys.clone(), values.clone()) if self.buffer is None else self.buffer.shown
        self.positions, self._looked_at = left, n - first
        self.window, self.since = window, max(self.since, since)

    def refuse_crop(self, tokens_to_remove: int) -> None:
        """Raise the error of :meth:`crop`, if there would be one."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop expects a number of tokens to remove as a negative integer, got {tokens_to_remove}")
        end, most = max(0, self.seen + tokens_to_remove), max(0, self.seen - self.since - self.window + 1)
        if max(0, end - self.window + 1) < min(self.since, end):
            raise RuntimeError(
                f"crop({tokens_to_remove}) of a cache of {self.seen} tokens: a layer that sees {self.window} of them"
                f" let go of others; expected at most {most} to remove, or activate_past_recording(), which keeps all,"
                " on an empty cache"
            )

    def crop(self, tokens_to_remove: int, shared: Shared | None = None) -> None:
        """Forget the last ``-tokens_to_remove`` *logical* tokens, whether or not this layer kept them.

        Raises:
            ValueError: for a positive number (transformers' convention).
            RuntimeError: tokens that are seen then were let go; nothing is forgotten.
        """
        self.refuse_crop(tokens_to_remove)
        if tokens_to_remove == 0 or self.positions is None:
            return
        before = self.positions.shape[1]
        self.seen = max(0, self.seen + tokens_to_remove)
        self.since, self._looked_at = (self.since, self._looked_at) if self.seen else (0, 0)
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
