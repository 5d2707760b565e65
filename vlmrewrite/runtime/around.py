"""A decoder captured by itself, and the rest of the model run around it as it is."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vlmrewrite import hf
from vlmrewrite.hf import Encoded, Projection
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.runtime.facts import Given, Prompt

Run = Callable[[dict[str, Any]], Any]

_RUN: ContextVar[tuple[nn.Module, Run] | None] = ContextVar("vlmrewrite_decoder", default=None)


@contextmanager
def in_place_of(decoder: nn.Module, run: Run) -> Iterator[None]:
    """While the block runs, in this context, a decoder that is :func:`watched_for` does this with its arguments."""
    token = _RUN.set((decoder, run))
    try:
        yield
    finally:
        _RUN.reset(token)


def watched_for(undo: hf.Undo, decoder: nn.Module) -> None:
    """Let calls of a decoder's forward go where :func:`in_place_of` says; elsewhere they are what they were."""
    if hf.has_own_forward(decoder):
        own = functools.wraps(type(decoder).forward)  # generate() looks at the names of a forward's arguments
        handing = own(lambda *args, **kwargs: handed_on(*args, **kwargs))
        hf.put_forward(undo, decoder, types.MethodType(handing, decoder))


def handed_on(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A decoder's forward, or where its call goes."""
    current = None if torch.compiler.is_dynamo_compiling() else _RUN.get()
    if current is None or current[0] is not self:
        return type(self).forward(self, *args, **kwargs)
    return current[1](hf.named(self, args, kwargs))


def refuse_unrewritten(model: nn.Module, what: str, given: Sequence[str], prompt: Prompt | None) -> None:
    """Behind a call that was given images: raise if no rewritten forward ran in it.

    Args:
        model: that was called.
        what: the method's name.
        given: its arguments that are images.
        prompt: the call's.
    """
    if given and prompt is not None and prompt.made is None:
        raise RuntimeError(
            f"{what}() of {type(model).__name__} was given {', '.join(given)}, and no rewritten forward ran in it, so"
            " that what comes out is that of the unmodified model: expected one that calls the forward of the"
            " model, or that of its decoder, with the images (vlmrewrite.restore(model) gives the unmodified model)"
        )


def entering(
    kwargs: dict[str, Any],
    cache: PositionCache,
    prompt: Prompt,
    images: Mapping[str, Encoded],
    runs: Sequence[Projection],
) -> tuple[Given | None, dict[str, Any]]:
    """What a decoder's call was given, None without an image, and its other arguments.

    Args:
        kwargs: its forward's arguments.
        cache: that of the call.
        prompt: what is known of the prompt.
        images: those that were encoded before; without them, what the parts around the decoder made is looked at.
        runs: of these parts.

    Raises:
        ValueError: there are images, and they do not stand in the embeddings.
    """
    embeddings, inside = kwargs.get("inputs_embeds"), hf.merged_inside(kwargs)
    found: dict[str, Encoded | None] = {}
    if inside is not None:
        found = {"image": inside}
    elif embeddings is not None and images:
        found = {name: hf.merged_outside(one, embeddings) for name, one in images.items()}
    elif embeddings is not None and runs:
        made = hf.projected(runs, embeddings)
        found = {"image": None if made is None else made[0]}
        prompt = prompt if made is None else replace(prompt, encodings=[made[1], *prompt.encodings])
    lost = [name for name, one in found.items() if one is None]
    if lost or (images and not found):
        raise ValueError(
            f"the {' and '.join(lost or images)} features do not stand in the embeddings that enter the decoder as the"
            " model encoded them: expected a model that writes them there unchanged, one for each of its tokens"
        )
    rest = hf.without_full_mask(kwargs)
    if not found:
        return None, rest
    return Given.at(dict(found), rest, cache, prompt), rest  # type: ignore[arg-type]
