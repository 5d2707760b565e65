"""Models inside wrappers of another library: a PEFT model is one around the Hugging Face model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from transformers import PreTrainedModel

F = TypeVar("F", bound=Callable[..., Any])


def base_model_of(model: Any) -> Any:
    """The Hugging Face model in a wrapper with ``get_base_model()``, as PEFT's are; anything else as it is."""
    while not isinstance(model, PreTrainedModel) and callable(getattr(model, "get_base_model", None)):
        model = model.get_base_model()
    return model


def on_base_model(function: F) -> F:
    """A function whose first argument is a Hugging Face model: it takes a wrapper too, and gives back what it took."""

    @functools.wraps(function)
    def taking(model: Any, *args: Any, **kwargs: Any) -> Any:
        inner = base_model_of(model)
        made = function(inner, *args, **kwargs)
        return model if made is inner else made

    return cast(F, taking)
