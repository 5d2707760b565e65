"""The position-carrying KV cache: every key knows its logical position, so layers may hold different tokens.

What is appended without recording gradients is written into spare room behind the keys and values of before, see
:mod:`vlmrewrite.room`; positions, a thousandth of the bytes and shared among layers, are concatenated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from vlmrewrite.room import Room, alike

T = TypeVar("T")
Shared = dict[int, tuple[Tensor | None, Any]]
"""By the id of a tensor of positions: that tensor, and what was made of it for all layers that hold it."""


def _once(shared: Shared, positions: Tensor | None, make: Callable[[], T]) -> T:
    if id(positions) not in shared:
        shared[id(positions)] = positions, make()
    made: T = shared[id(positions)][1]
    return made


class PositionLayer(CacheLayerMixin):
    """One layer's keys [B, Hk, m, D], values [B, Hk, m, Dv] and logical positions int64 [B, m].

    ``seen`` is the *logical* length, the tokens that went by, whatever the layer kept of them. A position of -1 is an
    empty slot; ``holes`` says that there may be some. ``shared``, where a method takes it, is filled by the first layer
    of several that hold the same tensor of positions, so that they go on to hold the same one.
    """

    room: Room | None = None

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.positions: Tensor | None = None
        self.seen = 0
        self.holes = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: the first update brings the tensors."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append k [B, Hk, t, D] and v [B, Hk, t, Dv] of the next t tokens and return all keys and values."""
        t = key_states.shape[2]
        if torch.compiler.is_compiling():
            pos = self._next(key_states)
            self.keys, self.values, self.positions = torch.ops.vlm.kv_append.default(
                self.keys, self.values, self.positions, key_states, value_states, pos
            )
        else:
            shared: Shared = kwargs.get("shared", {})
            self.positions = _once(shared, self.positions, lambda: self._grown(key_states))
            self._append(key_states, value_states)
        self.is_initialized = True
        self.seen += t
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _next(self, key_states: Tensor) -> Tensor:
        at = torch.arange(self.seen, self.seen + key_states.shape[2], device=key_states.device)
        return at.repeat(key_states.shape[0], 1)  # not a view, which Dynamo would compile for anew

    def _grown(self, key_states: Tensor) -> Tensor:
        pos = self._next(key_states)
        return pos if self.positions is None else torch.cat([self.positions, pos], 1)

    def _append(self, k: Tensor, v: Tensor) -> None:
        if self.keys is None or self.values is None:
            self.keys, self.values = k, v
        elif torch.is_grad_enabled() or not (alike(self.keys, k) and alike(self.values, v)):
            self.room = None
            self.keys, self.values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        else:
            self.keys, self.values = self.reserve(k.shape[2]).append(k, v)

    def own(self) -> Room | None:
        """The room that this layer's keys and values lie in."""
        room = self.room
        return room if room is not None and self.keys is room.shown[0] and self.values is room.shown[1] else None

    def reserve(self, more: int) -> Room:
        """Room for ``more`` tokens after those held; moves them if there is none. Not where gradients are recorded."""
        assert self.keys is not None and self.values is not None
        room = self.own()
        if room is None or not room.takes(more):
            self.room = room = Room(self.keys, self.values, more)
            self.keys, self.values = room.shown
        return room

    def release(self) -> None:
        """Lay keys and values out in one way only, without spare room."""
        self.room = None
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.contiguous(), self.values.contiguous()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical key length and offset for a mask of the next ``query_length`` tokens."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Logical length in tokens."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.positions = self.room = None
        self.is_initialized, self.seen, self.holes = False, 0, False

    def crop(self, tokens_to_remove: int, shared: Shared | None = None) -> None:
        """Forget the last ``-tokens_to_remove`` *logical* tokens, whether or not this layer kept them.

        Raises:
            ValueError: for a positive number (transformers' convention).
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop expects a number of tokens to remove as a negative integer, got {tokens_to_remove}")
        if tokens_to_remove == 0 or self.keys is None or self.values is None or self.positions is None:
            return
        self.seen = max(0, self.seen + tokens_to_remove)
        self.positions, holes = _once({} if shared is None else shared, self.positions, self._cropped)
        self.holes = self.holes or holes
        n, room = self.positions.shape[1], self.own()
        self.keys, self.values = (self.keys[:, :, :n], self.values[:, :, :n]) if room is None else room.show(n)

    def _cropped(self) -> tuple[Tensor, bool]:
        assert self.positions is not None
        left = self.positions.masked_fill(self.positions >= self.seen, -1)
        left = left[:, : _used(left)].clone(memory_format=torch.contiguous_format)
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
        """Copy some rows, once: to where the next tokens can follow, unless gradients are recorded."""
        if self.keys is None or self.values is None or self.positions is None:
            return
        positions = self.positions

        def chosen() -> tuple[Tensor, Tensor]:
            rows = choose(torch.arange(len(positions), device=positions.device))
            return rows, positions.index_select(0, rows)

        rows, self.positions = _once({} if shared is None else shared, positions, chosen)
        rows = rows.to(self.keys.device)
        if torch.is_grad_enabled():
            self.room = None
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
        else:
            self.room = Room(self.keys, self.values, 1, rows)
            self.keys, self.values = self.room.shown


def _used(positions: Tensor) -> int:
    """Columns up to the last one that any row uses."""
    used = (positions >= 0).any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


class PositionCache(Cache):
    """A transformers cache of :class:`PositionLayer`; grows as the model updates it."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=PositionLayer)
        self._shared: Shared = {}
        self._masks: dict[tuple[int, int, Callable[..., Any]], tuple[Any, Any]] = {}
        self._by_keys: dict[int, PositionLayer] = {}
        self._in_use = False

    @classmethod
    def take_over(cls, cache: Cache) -> PositionCache:
        """Turn an empty cache into one of this class, in place, so that its owner goes on with the same object."""
        cache.__class__ = cls
        taken = cast(PositionCache, cache)
        taken.__dict__.clear()
        taken.__init__()  # type: ignore[misc]
        return taken

    @classmethod
    @contextlib.contextmanager
    def taking_over(cls, cache: Cache) -> Iterator[PositionCache]:
        """:meth:`take_over`, undone if the block fails."""
        kind, state = type(cache), dict(cache.__dict__)
        try:
            yield cls.take_over(cache)
        except BaseException:
            cache.__class__ = kind
            cache.__dict__.clear()
            cache.__dict__.update(state)
            raise

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to layer ``layer_idx``; see :meth:`PositionLayer.update`.

        Raises:
            RuntimeError: the model that is running is not rewritten.
        """
        while len(self.layers) <= layer_idx:
            self.layers.append(PositionLayer())
        layer: Any = self.layers[layer_idx]
        if torch.compiler.is_compiling():
            both: tuple[Tensor, Tensor] = layer.update(key_states, value_states)
            return both
        if not self._in_use:
            raise RuntimeError(
                "this cache was filled by a rewritten model and holds other tokens in each layer; the model that runs"
                " now is not rewritten: start with an empty cache"
            )
        keys, values = layer.update(key_states, value_states, shared=self._shared)
        self._by_keys[id(keys)] = layer
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` logical tokens; see :meth:`PositionLayer.crop`."""
        self._each("crop", tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the next step come from rows ``beam_idx`` [B]."""
        self._each("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self._each("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices``."""
        self._each("batch_select_indices", indices)

    def _each(self, method: str, argument: Any) -> None:
        shared: Shared = {}
        for layer in self.layers:
            getattr(layer, method)(argument, shared)

    def begin(self) -> None:
        """Called before each uncaptured forward: forget what was shared among the layers of the last one."""
        self._in_use = True
        self._shared.clear()
        self._masks.clear()
        self._by_keys.clear()

    def end(self) -> None:
        """Called after each uncaptured forward."""
        self._in_use = False

    def seen_by(self, layer: PositionLayer, q: Tensor, mask: Tensor | None, visible: Callable[..., T]) -> T:
        """What queries q [B, H, t, D] see of a layer's keys, worked out once for layers that hold the same tokens.

        Args:
            layer: whose keys.
            q: the queries.
            mask: as for :func:`vlmrewrite.dialect.visible`.
            visible: that function, or another of the same arguments.
        """
        key = (id(layer.positions), id(mask), visible)
        if key not in self._masks:
            t, positions = q.shape[2], layer.positions
            assert positions is not None
            plain = mask is None and not layer.holes and (t == 1 or positions.shape[1] == t)
            q_pos = torch.arange(layer.seen - t, layer.seen, device=q.device)[None].expand(q.shape[0], -1)
            self._masks[key] = ((positions, mask), visible(mask, q_pos, positions, plain))
        seen: T = self._masks[key][1]
        return seen

    def layer_of(self, keys: Tensor) -> PositionLayer | None:
        """The layer whose last update returned this very tensor."""
        return self._by_keys.get(id(keys))

    def kv_lengths(self) -> list[int]:
        """Number of keys each layer holds."""
        layers: list[Any] = self.layers
        return [0 if layer.keys is None else layer.keys.shape[2] for layer in layers]

    def holes(self) -> bool:
        """Whether any layer may have empty slots."""
        layers: list[Any] = self.layers
        return any(layer.holes for layer in layers)

    def contiguous(self) -> None:
        """Lay keys and values out in one way only: what is compiled for one layout is compiled again for another."""
        layers: list[Any] = self.layers
        for layer in layers:
            layer.release()

    def reserve(self, more: int) -> bool:
        """Lay keys and values out with room for ``more`` tokens, in every layer or else, and then False, in none."""
        layers: list[Any] = self.layers
        if torch.is_grad_enabled() or not layers or any(layer.keys is None for layer in layers):
            return False
        for layer in layers:
            layer.reserve(more)
        return True

    def kv_bytes(self) -> int:
        """Bytes of the keys and values held, without the room to spare."""
        layers: list[Any] = self.layers
        held: list[Tensor] = [x for layer in layers for x in (layer.keys, layer.values) if x is not None]
        return sum(x.numel() * x.element_size() for x in held)

    def allocated_bytes(self) -> int:
        """Bytes of memory of keys and values, with the room to spare."""
        layers: list[Any] = self.layers
        rooms: list[Room | None] = [layer.own() for layer in layers]
        return self.kv_bytes() + sum(room.spare_bytes() for room in rooms if room is not None)
