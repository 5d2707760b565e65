"""Activation (gradient) checkpointing, as transformers switches it on: flags of a model's modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from vlmrewrite.hf.decoder import decoder_layers
from vlmrewrite.hf.undo import Undo

_FLAG, _RUN, _TAKEN = "gradient_checkpointing", "_gradient_checkpointing_func", "vlmrewrite_checkpointing"


class Checkpointing(NamedTuple):
    """Which decoder layers are computed again in the backward pass, and by what.

    Attributes:
        run: ``torch.utils.checkpoint.checkpoint`` with its options.
        which: of the layers, in order.
    """

    run: Callable[..., Any]
    which: tuple[bool, ...]

    @property
    def form(self) -> tuple[object, ...]:
        """What is equal for two that do the same: transformers makes a new partial each time it is switched on."""
        if not isinstance(self.run, functools.partial):
            return self.run, self.which
        return self.run.func, self.run.args, tuple(sorted(self.run.keywords.items())), self.which


def take_checkpointing(model: nn.Module, undo: Undo) -> Checkpointing | None:
    """What the layers' flags ask for; then those of the decoder are off, as long as a recipe is applied.

    A decoder that recomputes itself ignores the cache, and could not be captured. So that the model still says that
    checkpointing is on, and can be told that it is not, its embeddings, which look at no flag, bear one.

    Args:
        model: that a recipe is applied to.
        undo: closed when the recipe is taken off: switches the decoder's flags on again, if it is asked for then.

    Returns:
        None where no layer's flag is on.

    Raises:
        NotImplementedError: a part of a layer has such a flag, or a layer does not say what recomputes it.
    """
    decoder, bearer = model.get_decoder(), _bearer(model)  # type: ignore[operator]
    layers = [model.get_submodule(name) for name in decoder_layers(model)]
    inside = [m for layer in layers for m in layer.modules() if m is not layer and getattr(m, _FLAG, False)]
    which = tuple(bool(getattr(layer, _FLAG, False)) for layer in layers)
    if not inside and not any(which):
        return None
    run = getattr(layers[0], _RUN, None)
    if inside or run is None:
        raise NotImplementedError(
            f"gradient checkpointing is on in {type((*inside, layers[0])[0]).__name__}, by other means than model."
            "activation_checkpointing_enable(): use that, or switch it off"
        )
    flagged = [m for m in decoder.modules() if getattr(m, _FLAG, False)]
    if _TAKEN not in vars(bearer):
        undo.callback(_give_back, bearer)
    for m in flagged:
        setattr(m, _FLAG, False)
    vars(bearer).update({_FLAG: True, _TAKEN: flagged})
    return Checkpointing(run, which)


def _give_back(bearer: nn.Module) -> None:
    flagged, on = vars(bearer).pop(_TAKEN), vars(bearer).pop(_FLAG)
    for m in flagged if on else ():
        setattr(m, _FLAG, True)


def is_checkpointing(model: nn.Module) -> bool:
    """Whether checkpointing, taken before, is still asked for."""
    return bool(vars(_bearer(model)).get(_FLAG))


def _bearer(model: nn.Module) -> nn.Module:
    return model.get_input_embeddings()  # type: ignore[operator, no-any-return]
