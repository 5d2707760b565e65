"""A cache that somebody gave, turned into ours in place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, QuantizedCache, StaticCache

from vlmrewrite.hf import cannot_hold
from vlmrewrite.kvcache.cache import PositionCache
from vlmrewrite.kvcache.state import FINAL, StateLayer


@contextlib.contextmanager
def adopted(given: Any, model: nn.Module, keep: bool) -> Iterator[PositionCache]:
    """The cache of a model's call: a new one, or the one given, turned in place into a :class:`PositionCache`.

    Its owner goes on with it. That is undone if the block fails.

    Args:
        given: what the call was given, or None.
        model: whose call it is.
        keep: whether somebody goes on with it.

    Raises:
        TypeError: it is no transformers cache.
        NotImplementedError: it is one of a kind that cannot hold another number of tokens in each layer, or is to go
            back to earlier states.
        ValueError: it holds tokens that went through the unmodified model.
    """
    cache = PositionCache(model) if given is None else given
    before = None if isinstance(cache, PositionCache) else adopt(given, model)
    try:
        yield cache
    except BaseException:
        if before is not None:
            given.__class__, given.__dict__ = before
        raise
    if keep:
        cache.let_go()


def adopt(given: Any, model: nn.Module) -> tuple[Any, Any]:
    """Turn a cache that somebody gave into a :class:`PositionCache`, in place; what it was is returned.

    One with a static length keeps it: see :class:`PositionLayer`. One that is quantised or offloaded stays so: see
    :class:`StoredLayer`.

    Raises:
        TypeError, NotImplementedError, ValueError: as for :func:`adopted`.
    """
    if not isinstance(given, Cache):
        raise TypeError(f"past_key_values is a {type(given).__name__}; expected a transformers Cache")
    if type(given) not in (DynamicCache, StaticCache, QuantizedCache):
        raise NotImplementedError(cannot_hold(given))
    if int(given.get_seq_length()) > 0:
        raise ValueError(
            f"past_key_values holds {int(given.get_seq_length())} tokens that went through the unmodified model;"
            " start again with an empty cache"
        )
    stores: Sequence[Any] = given.layers if type(given) is QuantizedCache else [DynamicLayer()] * given.offloading
    before, made = (given.__class__, given.__dict__), PositionCache(model, stores)
    if given.offloading:
        made.offloading, made.only_non_sliding, made.prefetch_stream = True, False, given.prefetch_stream
    final = any(isinstance(layer, StateLayer) and not layer.is_croppable for layer in made.layers)
    recorded = any(getattr(layer, "record_past", False) for layer in given.layers)
    made.record_past = recorded or not given.layers  # as transformers' own keeps all that knows no config
    if final and recorded:
        raise NotImplementedError(f"{FINAL}: generate without an assistant")
    made.length = max((getattr(layer, "max_cache_len", 0) for layer in given.layers), default=0)
    given.__class__, given.__dict__ = PositionCache, made.__dict__
    return before
