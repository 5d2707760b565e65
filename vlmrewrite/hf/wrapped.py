"""Models inside what is handed on in their place: a PEFT model around the Hugging Face model, a pipeline with it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedModel

F = TypeVar("F", bound=Callable[..., Any])


def base_model_of(model: Any) -> Any:
    """The Hugging Face model in a wrapper with ``get_base_model()``, as PEFT's are, or in a pipeline; else as it is."""
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "model", None), nn.Module):
        model = model.model
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
