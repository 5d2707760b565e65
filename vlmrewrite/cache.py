"""The position-carrying KV cache: every key knows its logical position, so layers may hold different tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from vlmrewrite import dialect


class PositionLayer(CacheLayerMixin):
    """One layer's keys [B, Hk, m, D], values [B, Hk, m, Dv] and logical positions int64 [B, m].

    ``seen`` is the *logical* length, the tokens that went by, whatever the layer kept of them. A position of -1 is an
    empty slot; ``holes`` says that there may be some.
    """

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
            pos = torch.arange(self.seen, self.seen + t, device=key_states.device)[None].expand(key_states.shape[0], -1)
            self.keys, self.values, self.positions = torch.ops.vlm.kv_append.default(
                self.keys, self.values, self.positions, key_states, value_states, pos
            )
        else:
            grown: dict[int, tuple[Tensor | None, Tensor]] = kwargs["grown"]
            key = id(self.positions)
            if key not in grown:
                grown[key] = self.positions, self._grow(key_states, t)
            pos = grown[key][1]
            if self.keys is None or self.values is None:
                self.keys, self.values = key_states, value_states
            else:
                self.keys = torch.cat([self.keys, key_states], 2)
                self.values = torch.cat([self.values, value_states], 2)
            self.positions = pos
        self.is_initialized = True
        self.seen += t
        return self.keys, self.values

    def _grow(self, key_states: Tensor, t: int) -> Tensor:
        pos = torch.arange(self.seen, self.seen + t, device=key_states.device)[None].expand(key_states.shape[0], -1)
        return pos if self.positions is None else torch.cat([self.positions, pos], 1)

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
        self.keys = self.values = self.positions = None
        self.is_initialized, self.seen, self.holes = False, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` *logical* tokens, whether or not this layer kept them.

        Raises:
            ValueError: for a positive number (transformers' convention).
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop expects a number of tokens to remove as a negative integer, got {tokens_to_remove}")
        if tokens_to_remove == 0 or self.keys is None or self.values is None or self.positions is None:
            return
        self.seen = max(0, self.seen + tokens_to_remove)
        left = self.positions.masked_fill(self.positions >= self.seen, -1)
        length = _used(left)
        self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        self.positions = left[:, :length]
        self.holes = self.holes or bool((self.positions < 0).any())

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the next step come from rows ``beam_idx`` [B]."""
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self._rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only the rows ``indices``."""
        self._rows(lambda x: x[indices])

    def _rows(self, change: Any) -> None:
        if self.keys is not None:
            self.keys, self.values, self.positions = change(self.keys), change(self.values), change(self.positions)


def _used(positions: Tensor) -> int:
    """Columns up to the last one that any row uses."""
    used = (positions >= 0).any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 0


class PositionCache(Cache):
    """A transformers cache of :class:`PositionLayer`; grows as the model updates it."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=PositionLayer)
        self._grown: dict[int, tuple[Tensor | None, Tensor]] = {}
        self._masks: dict[tuple[int, int], tuple[Any, Tensor | None]] = {}
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
        keys, values = layer.update(key_states, value_states, grown=self._grown)
        self._by_keys[id(keys)] = layer
        return keys, values

    def begin(self) -> None:
        """Called before each uncaptured forward: forget what was shared among the layers of the last one."""
        self._in_use = True
        self._grown.clear()
        self._masks.clear()
        self._by_keys.clear()

    def end(self) -> None:
        """Called after each uncaptured forward."""
        self._in_use = False

    def seen_by(self, layer: PositionLayer, q: Tensor, mask: Tensor | None) -> tuple[Tensor | None, bool]:
        """Mask for queries q [B, H, t, D] over a layer's keys, shared by layers that hold the same tokens.

        Returns:
            (mask or None as :func:`vlmrewrite.dialect.attend` takes it, whether it is exact to use none).
        """
        key = (id(layer.positions), id(mask))
        if key not in self._masks:
            t, positions = q.shape[2], layer.positions
            assert positions is not None
            whole = mask is None and not layer.holes
            if whole and (t == 1 or positions.shape[1] == t):
                seen = None
            else:
                q_pos = torch.arange(layer.seen - t, layer.seen, device=q.device)[None].expand(q.shape[0], -1)
                seen = dialect.visible(mask, q_pos, positions, False)
            self._masks[key] = ((positions, mask), seen)
        return self._masks[key][1], self._masks[key][1] is None

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
            if layer.keys is not None:
                layer.keys, layer.values = layer.keys.contiguous(), layer.values.contiguous()

    def kv_bytes(self) -> int:
        """Bytes of keys and values held."""
        layers: list[Any] = self.layers
        held: list[Tensor] = [x for layer in layers for x in (layer.keys, layer.values) if x is not None]
        return sum(x.numel() * x.element_size() for x in held)
