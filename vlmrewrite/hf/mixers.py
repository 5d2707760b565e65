"""Decoder layers with a state in the cache in place of keys: linear attention, state spaces, short convolutions."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers.cache_utils import (
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

from vlmrewrite.hf.decoder import decoder_layers

CACHE_ARGUMENTS = ("cache_params", "past_key_values")


def cache_layers(model: nn.Module) -> list[Any]:
    """An empty cache layer of transformers' own for each decoder layer, of the kind that the layer's type asks for."""
    return DynamicCache(config=model.config).layers  # type: ignore[arg-type]


def attending(model: nn.Module) -> list[int]:
    """The decoder layers that keep keys, and so pay attention."""
    return [i for i, layer in enumerate(cache_layers(model)) if isinstance(layer, CacheLayerMixin)]


def is_recurrent(layer: object) -> bool:
    """Whether a cache layer holds a state of fixed size, and no keys."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, CacheLayerMixin)


def refuse_cache_layers(model: nn.Module) -> None:
    """Refuse a decoder whose layers keep something that cannot be told for a part of the tokens.

    Raises:
        ValueError: a layer keeps keys and a state side by side, or an index over its keys; or layers with a state
            stand among others that keep nothing.
    """
    layers = cache_layers(model)
    for i, layer in enumerate(layers):
        kept = None
        if isinstance(layer, LinearAttentionCacheLayerMixin) and not is_recurrent(layer):
            kept = "keys and a recurrent state side by side"
        elif isinstance(layer, CacheLayerMixin) and type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            kept = "more than keys and values (an index over them, or keys that are merged)"
        elif isinstance(layer, DummyLayer) and any(map(is_recurrent, layers)):
            kept = "nothing, among layers that keep a recurrent state"
        if kept is not None:
            raise ValueError(
                f"decoder layer {i} of {type(model).__name__} keeps {kept} ({type(layer).__name__}); expected layers"
                " that keep keys and values, or a recurrent or convolutional state"
            )


def recurrent_mixers(model: nn.Module) -> dict[int, nn.Module]:
    """By layer, the module that mixes tokens by way of a state, of each decoder layer that has one.

    Raises:
        ValueError: there is not exactly one such module in one of these layers.
    """
    recurrent = [i for i, layer in enumerate(cache_layers(model)) if is_recurrent(layer)]
    names = decoder_layers(model) if recurrent else []
    return {i: mixer_of(model.get_submodule(names[i])) for i in recurrent}


def mixer_of(layer: nn.Module) -> nn.Module:
    """The one module inside a decoder layer that takes the cache.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = {name: m for name, m in layer.named_modules() if name and cache_argument(m) is not None}
    if len(found) != 1:
        raise ValueError(
            f"expected one module of {type(layer).__name__} to take the cache, found {list(found) or 'none'}"
        )
    mixer: nn.Module = next(iter(found.values()))
    return mixer


def cache_argument(module: nn.Module) -> str | None:
    """The name under which a module's forward takes the cache, or None."""
    parameters = inspect.signature(type(module).forward).parameters
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)
