"""The position-carrying KV cache, as transformers takes one."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from vlmrewrite.hf import Kept, cache_states
from vlmrewrite.kvcache.fixed import Fixed
from vlmrewrite.kvcache.layer import PositionLayer, Shared, T, once
from vlmrewrite.kvcache.state import StateLayer
from vlmrewrite.kvcache.stored import StoredLayer


class PositionCache(Cache):
    """A transformers cache of :class:`PositionLayer`; grows as the model updates it.

    ``length`` is that of the whole sequence, if somebody has said it; else 0. ``steady``: a compiler runs its steps.

    Args:
        model: for which; where it has layers without keys, the cache has a :class:`StateLayer` for each from the start,
            and those that slide over a window let go of what is before it.
        stores: empty transformers layers that keep keys and values, one for each layer, the last of them for all behind
            it; without any, the cache keeps them itself.
    """

    layers: list[Any]

    def __init__(self, model: nn.Module | None = None, stores: Sequence[CacheLayerMixin] = ()) -> None:
        depth, states, self._windows = Kept(0, {}, {}) if model is None else cache_states(model)
        self.stores, self.record_past, self.steady = stores, False, False
        if states:
            made = [StateLayer(states[i]) if i in states else self._new(i) for i in range(depth)]
            super().__init__(layers=made)  # type: ignore[arg-type]
        else:
            super().__init__(layer_class_to_replicate=PositionLayer)
        self._shared: Shared = {}
        self._by_keys: dict[int, PositionLayer] = {}
        self._latest: PositionLayer | None = None
        self._in_use = False
        self._fixed: Fixed | None = None
        self.length = 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to layer ``layer_idx``; see :meth:`PositionLayer.update`.

        Raises:
            RuntimeError: the model that is running is not rewritten.
        """
        if torch.compiler.is_dynamo_compiling():
            return super().update(key_states, value_states, layer_idx)
        if not self._in_use:
            raise RuntimeError(
                "this cache was filled by a rewritten model and holds other tokens in each layer; the model that runs"
                " now is not rewritten: start with an empty cache"
            )
        layer = self.layer(layer_idx)
        layer.length = self.length
        if self.offloading:
            layer.prefetch()  # unless it was while the layer before computed
        if self.offloading and key_states.is_cuda:
            keys, values = super().update(key_states, value_states, layer_idx, shared=self._shared)
        else:
            keys, values = layer.update(key_states, value_states, shared=self._shared)
            if self.offloading:
                layer.offload()
        self._by_keys[id(keys)] = self._latest = layer
        if self.stores:  # nobody holds these keys, and another tensor may come to have their identity
            weakref.finalize(keys, self._by_keys.pop, id(keys), None).atexit = False
        return keys, values

    def layer(self, layer_idx: int) -> Any:
        """Layer ``layer_idx``, there from now on."""
        while len(self.layers) <= layer_idx:
            self.layers.append(self._new(len(self.layers)))
        return self.layers[layer_idx]

    def _new(self, layer_idx: int) -> PositionLayer:
        if not self.stores:
            return PositionLayer()
        return StoredLayer(self.stores[min(layer_idx, len(self.stores) - 1)])

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """While the block runs, all keys and values are here, as captured graphs take and return them.

        What was appended in it is stored behind it, unless it fails.
        """
        if not self.stores:
            yield
            return
        before = self.layers, self.stores, self.offloading
        self.layers = [x.opened() if isinstance(x, StoredLayer) else x for x in self.layers]
        self.stores, self.offloading = (), False
        try:
            yield
        finally:
            plain = self.layers
            self.layers, self.stores, self.offloading = before
        for i, layer in enumerate(plain):
            if isinstance(layer, PositionLayer):
                stored = self.layer(i)
                if self.offloading:
                    stored.prefetch()
                stored.take(layer)
                if self.offloading:
                    stored.offload()

    @contextlib.contextmanager
    def in_full(self, more: int) -> Iterator[bool]:
        """While the block runs, a step of one token, each layer is all of its buffer, if that can be; whether it is.

        It can if the sequence's length was said, and all layers of attention hold keys; recurrent ones stay as they
        are. See :mod:`vlmrewrite.kvcache.fixed`.
        """
        held = self.attended
        can_be = all(type(layer) is PositionLayer and layer.keys is not None for layer in held)
        seen = {layer.seen for layer in held} if can_be else {self.length}
        if more != 1 or torch.is_grad_enabled() or len(seen) != 1 or seen.pop() >= self.length:
            yield False
            return
        fixed, self._fixed = self._fixed, None  # if the block fails, something may have been written
        if fixed is None or not fixed.still(held):
            self.reserve(more)
            fixed = Fixed(held)
        layers, full = self.layers, iter(fixed.layers)
        self.layers = [next(full) if isinstance(layer, PositionLayer) else layer for layer in layers]
        try:
            yield True
        finally:
            self.layers = layers
        fixed.advance(held)
        self._fixed = fixed

    def __getstate__(self) -> dict[str, Any]:
        """All but what is made anew where it is missing."""
        return vars(self) | {"_fixed": None}

    @property
    def attended(self) -> list[PositionLayer]:
        """The layers that hold keys."""
        return [layer for layer in self.layers if isinstance(layer, PositionLayer)]

    def activate_past_recording(self) -> None:
        """Keep all tokens from here on, so that any number can be forgotten again."""
        super().activate_past_recording()  # type: ignore[no-untyped-call]
        self.record_past = True

    def let_go(self) -> None:
        """Forget what no later token sees; see :meth:`PositionLayer.let_go`.

        Not where the sequence's length was said, keys are stored elsewhere, or gradients are recorded; nor between
        compiled steps, which would be compiled anew for layers of another length.
        """
        if self.record_past or self.stores or self.length or self.steady or torch.is_grad_enabled():
            return
        shared: dict[int, Shared] = defaultdict(dict)
        for i, window in self._windows.items():
            if i < len(self.layers):
                self.layers[i].let_go(window, shared[window])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` logical tokens; see :meth:`PositionLayer.crop`.

        Raises:
            NotImplementedError: there are recurrent layers; nothing is forgotten.
            RuntimeError: a layer that slides has let go of tokens that are seen then; nothing is forgotten.
        """
        for layer in self.attended:
            layer.refuse_crop(tokens_to_remove)
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
        for layer in sorted(self.layers, key=lambda x: isinstance(x, PositionLayer)):  # first those that may refuse
            getattr(layer, method)(argument, shared)

    def begin(self) -> None:
        """Called before each uncaptured forward: forget what was shared among the layers of the last one."""
        self._in_use = True
        self._shared.clear()
        self._by_keys.clear()
        self._latest = None

    def end(self) -> None:
        """Called after each uncaptured forward."""
        self._in_use = False
        if self.offloading and self.prefetch_stream.device.type == "cuda":  # the first layer's are on their way
            torch.cuda.current_stream(self.prefetch_stream.device).wait_stream(self.prefetch_stream)

    def __deepcopy__(self, memo: dict[int, Any]) -> PositionCache:
        new = memo[id(self)] = type(self).__new__(type(self))
        state = self.__getstate__()
        same = {k: x for k, x in state.items() if isinstance(x, torch.Stream)}  # which nothing copies
        vars(new).update({k: copy.deepcopy(x, memo) for k, x in state.items() if k not in same} | same)
        return new

    def seen_by(self, layer: PositionLayer, q: Tensor, mask: Tensor | None, visible: Callable[..., T]) -> T:
        """What queries q [B, H, t, D] see of a layer's keys, worked out once for layers that hold the same tokens.

        Args:
            layer: whose keys.
            q: the queries.
            mask: as for :func:`vlmrewrite.ops.attention.visible`.
            visible: that function, or another of the same arguments.
        """

        def look() -> T:
            t = q.shape[2]
            q_pos = torch.arange(layer.seen - t, layer.seen, device=q.device)[None].expand(q.shape[0], -1)
            return visible(mask, q_pos, layer.positions, layer.plainly(t, mask))

        return once(self._shared, (layer.positions, mask, visible), look)

    def layer_of(self, keys: Tensor) -> PositionLayer | None:
        """The layer whose last update returned this very tensor, or the one updated last, if these are made of its."""
        latest, self._latest = self._latest, None
        made = latest is not None and latest.positions.shape[1] == keys.shape[2]
        return self._by_keys.get(id(keys), latest if made else None)

    def kv_lengths(self) -> list[int]:
        """Number of keys each layer holds; 0 for one without."""
        return [0 if getattr(x, "positions", None) is None else x.positions.shape[1] for x in self.layers]

    def holes(self) -> bool:
        """Whether any layer may have empty slots."""
        return any(layer.holes for layer in self.attended)

    def contiguous(self) -> None:
        """Lay keys and values out in one way only: what is compiled for one layout is compiled again for another."""
        for layer in self.layers:
            layer.release()

    def reserve(self, more: int) -> bool:
        """Lay keys and values out with room for ``more`` tokens, in every layer or else, and then False, in none."""
        if torch.is_grad_enabled() or not self.layers or any(layer.keys is None for layer in self.attended):
            return False
        for layer in self.attended:
            layer.length = self.length
            layer.reserve(more)
        return True

    def kv_bytes(self) -> int:
        """Bytes of the keys and values held, as they are stored, without the spare room."""
        return sum(layer.nbytes() for layer in self.attended)
