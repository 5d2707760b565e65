"""Decoder layers with a state in the cache in place of keys: linear attention, state spaces, short convolutions."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

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
from vlmrewrite.hf.inputs import argument_names

_USUAL = (DynamicLayer, DynamicSlidingWindowLayer)

_OF_TOKENS = ("hidden_states", "position_embeddings", "attention_mask", "position_ids")

CACHE_ARGUMENTS = ("cache_params", "past_key_values")


def cache_layers(model: nn.Module) -> list[Any]:
    """An empty cache layer of transformers' own for each decoder layer, of the kind that the layer's type asks for."""
    return DynamicCache(config=model.config).layers  # type: ignore[arg-type]


def attending(model: nn.Module) -> list[int]:
    """The decoder layers that keep keys and values and nothing else, and so pay attention that can be looked at."""
    return [
        i for i, layer in enumerate(cache_layers(model)) if isinstance(layer, CacheLayerMixin) and not _index(layer)
    ]


def is_recurrent(layer: object) -> bool:
    """Whether a cache layer holds a state of fixed size, and no keys."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, CacheLayerMixin)


def feedforward_layers(model: nn.Module, layers: Sequence[Any] | None = None) -> list[int]:
    """The decoder layers that keep nothing, because no token meets another in them.

    Args:
        model: whose decoder.
        layers: what :func:`cache_layers` returned, if it has been asked.
    """
    idle = [i for i, x in enumerate(cache_layers(model) if layers is None else layers) if isinstance(x, DummyLayer)]
    names = decoder_layers(model) if idle else []
    inside = {i: list(model.get_submodule(names[i]).modules())[1:] for i in idle}
    return [i for i in idle if not any(map(cache_argument, inside[i]))]


class Kept(NamedTuple):
    """What a decoder's layers keep of the tokens before.

    Attributes:
        depth: how many layers there are.
        states: of layers without keys, how many states each keeps.
        windows: of layers that slide, how many tokens a token sees, itself included.
    """

    depth: int
    states: dict[int, int]
    windows: dict[int, int]


def cache_states(model: nn.Module) -> Kept:
    """What a model's decoder keeps; found once for a model, as long as its config says the same."""
    config = vars(model.config.get_text_config(decoder=True))  # type: ignore[union-attr, operator]
    known = _KEPT.get(model)
    if known is None or known[0] != config:
        layers = cache_layers(model)
        states = {i: x.number_of_states for i, x in enumerate(layers) if is_recurrent(x)}
        states |= dict.fromkeys(feedforward_layers(model, layers), 0)
        windows = {i: n for i, x in enumerate(layers) if isinstance(n := getattr(x, "sliding_window", None), int)}
        told = {k: list(x) if isinstance(x, list) else x for k, x in config.items()}
        known = _KEPT[model] = told, Kept(len(layers), states, windows)
    return known[1]


_KEPT: WeakKeyDictionary[nn.Module, tuple[dict[str, Any], Kept]] = WeakKeyDictionary()


def refuse_cache_layers(model: nn.Module) -> None:
    """Refuse a decoder whose layers keep something that cannot be told for a part of the tokens.

    Raises:
        ValueError: a layer keeps keys and a state side by side, or more than keys, values and an index over them; or
            layers with a state stand among others that share keys; or an index goes by what other layers make.
    """
    layers = cache_layers(model)
    alone = feedforward_layers(model, layers)
    for i, layer in enumerate(layers):
        kept = None
        if isinstance(layer, LinearAttentionCacheLayerMixin) and not is_recurrent(layer):
            kept = "keys and a recurrent state side by side"
        elif isinstance(layer, CacheLayerMixin) and type(layer) not in _USUAL and _index(layer) is None:
            kept = "more than keys and values and one index over them"
        elif isinstance(layer, DummyLayer) and i not in alone and any(map(is_recurrent, layers)):
            kept = "no keys of its own, among layers that keep a recurrent state"
        if kept is not None:
            raise ValueError(
                f"decoder layer {i} of {type(model).__name__} keeps {kept} ({type(layer).__name__}); expected layers"
                " that keep keys and values, with an index over them or without, or a recurrent or convolutional state"
            )
    for i, (module, _) in indexed_mixers(model).items():
        parameters = inspect.signature(type(module).forward).parameters
        others = [name for name in [*parameters][1:] if name not in _OF_TOKENS and name not in CACHE_ARGUMENTS]
        others = [name for name in others if parameters[name].kind is not inspect.Parameter.VAR_KEYWORD]
        if others:
            raise ValueError(
                f"decoder layer {i} of {type(model).__name__} selects keys by an index, and takes {', '.join(others)};"
                f" expected one that takes no more than {', '.join(_OF_TOKENS)} and the cache"
            )


def recurrent_mixers(model: nn.Module) -> dict[int, nn.Module]:
    """By layer, the module that mixes tokens by way of a state, of each decoder layer that has one.

    Raises:
        ValueError: there is not exactly one such module in one of these layers.
    """
    recurrent = [i for i, layer in enumerate(cache_layers(model)) if is_recurrent(layer)]
    names = decoder_layers(model) if recurrent else []
    return {i: mixer_of(model.get_submodule(names[i])) for i in recurrent}


def _index(layer: Any) -> str | None:
    """The method by which a cache layer takes what an index holds, if it is one of keys, values and one index."""
    kind = type(layer)
    if kind in _USUAL or not isinstance(layer, DynamicLayer) or kind.update is not DynamicLayer.update:
        return None
    found = [name for name in dir(kind) if name.startswith("update") and not hasattr(DynamicLayer, name)]
    return found[0] if len(found) == 1 else None


def indexed_mixers(model: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """By layer, the module that attends to the keys that its index selects, and the method that takes what it holds."""
    found = {i: name for i, layer in enumerate(cache_layers(model)) if (name := _index(layer)) is not None}
    names = decoder_layers(model) if found else []
    return {i: (mixer_of(model.get_submodule(names[i])), index) for i, index in found.items()}


def mixer_of(layer: nn.Module) -> nn.Module:
    """The one module inside a decoder layer that takes the cache, whatever it hands it on to.

    Raises:
        ValueError: there is none, or more than one.
    """
    taking = {name: m for name, m in layer.named_modules() if name and cache_argument(m) is not None}
    found = {name: m for name, m in taking.items() if not any(name.startswith(f"{other}.") for other in taking)}
    if len(found) != 1:
        raise ValueError(
            f"expected one module of {type(layer).__name__} to take the cache, found {list(found) or 'none'}"
        )
    mixer: nn.Module = next(iter(found.values()))
    return mixer


def cache_argument(module: nn.Module) -> str | None:
    """The name under which a module's forward takes the cache, or None."""
    names = argument_names(type(module).forward)
    return next((name for name in CACHE_ARGUMENTS if name in names), None)
