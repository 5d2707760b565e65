"""Caches that ``generate()`` may be asked for, and which of them hold another number of tokens in each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_OTHER = "paged"
"""A part of the names of those that do not."""

_EXPECTED = (
    "a rewritten model holds another number of tokens in each layer, which takes a DynamicCache, a StaticCache or a"
    " QuantizedCache; leave it out (cache_implementation: of the call, its generation config, the model's)"
)


def refuse_implementation(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse a call of ``generate()`` before transformers makes a cache of another kind.

    Args:
        model: a rewritten one.
        args, kwargs: of its ``generate()``.

    Raises:
        NotImplementedError: the call, its generation config or the model's names an implementation that cannot be.
    """
    config = kwargs.get("generation_config", args[1] if len(args) > 1 else None)
    found: dict[str, Any] = {}
    for source in (getattr(model, "generation_config", None), config):
        for key in ("cache_implementation", "use_cache"):
            if (value := getattr(source, key, None)) is not None:
                found[key] = value
    found |= {key: kwargs[key] for key in ("cache_implementation", "use_cache") if kwargs.get(key) is not None}
    name = found.get("cache_implementation")
    if isinstance(name, str) and found.get("use_cache", True) and _OTHER in name:
        raise NotImplementedError(f"cache_implementation={name!r}: {_EXPECTED}")


def cannot_hold(given: Any) -> str:
    """What is said of a cache that somebody gave, which is of another kind."""
    return f"past_key_values is a {type(given).__name__}; {_EXPECTED}"
