"""Capturing a model's forward, or its decoder's, without running it and without a recipe."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vlmrewrite import capture, hf
from vlmrewrite.capture import Graph, captures_of
from vlmrewrite.compiler import program_of
from vlmrewrite.errors import CaptureError
from vlmrewrite.hf import Encoded, on_base_model, refuse_packed, tidy
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.ops import mixers_swapped, whole_until
from vlmrewrite.plan import FEATURES
from vlmrewrite.rewrite import Program
from vlmrewrite.runtime.around import entering, in_place_of
from vlmrewrite.runtime.below import put_below
from vlmrewrite.runtime.facts import Given, Prompt


class _Stop(Exception):
    """Raised in place of running a graph that is only to be captured."""


@on_base_model
def trace(model: nn.Module, inputs: dict[str, Any]) -> Program:
    """Capture a model's forward for some inputs; nothing is installed, and the decoder is not run.

    Args:
        model: an unmodified model, on any device (the meta device too).
        inputs: what the model's forward takes, with an image.

    Raises:
        ValueError: the inputs hold no image, or the graph could not be recognised.
        RuntimeError: the forward could not be captured as one graph.
    """
    hf.check_support(model)
    capture.register()
    found, prompt = list[tuple[Graph, tuple[Any, ...]]](), Prompt()

    def runner(graph: Graph, flat: Sequence[Any]) -> Any:
        found.append((graph, tuple(flat)))
        raise _Stop

    decoder = hf.decoder_of(model)
    inner, cache, givens = hf.language_model(model) is not None, PositionCache(model), list[Given]()

    def run(kwargs: dict[str, Any]) -> Any:
        given, rest = entering({k: x for k, x in kwargs.items() if k not in _OWN}, cache, prompt, images, runs)
        if given is not None:
            givens[:] = [given]
            captures_of(decoder).inner(runner, decoder, cache, rest, given.images, model)
        raise _Stop

    with contextlib.suppress(_Stop), contextlib.ExitStack() as stack:
        for each in (hf.attention_swapped(model), mixers_swapped(model), torch.no_grad()):
            stack.enter_context(each)
        stack.callback((undo := hf.Undo(model)).close)
        stack.enter_context(whole_until(undo))
        put_below(undo, model, None)
        kwargs, prompt.sizes = tidy(model, (), dict(inputs), prompt.encodings.append, encode=not inner)
        if kwargs.get("use_cache") is False:
            refuse_packed(kwargs)
        kwargs, images = {k: x for k, x in kwargs.items() if k not in _OWN}, dict[str, Encoded]()
        given, rest = Given.of(kwargs, cache, prompt)
        if given is not None:
            givens, images = [given], given.images
            try:
                captures_of(model).call(runner, model, cache, rest, images)
            except CaptureError as e:
                stack.push(functools.partial(_prefer, e))
        if inner or given is not None:
            runs = stack.enter_context(hf.projections(model))
            stack.enter_context(in_place_of(decoder, run))
            hf.run_around(model, decoder, kwargs)
    if not found:
        raise ValueError(f"the inputs hold no image: {', '.join(inputs)}; expected pixel_values or the like")
    graph, flat = found[0]
    program = program_of(graph)
    call, missing = givens[0].call(graph, flat, FEATURES, False, model)
    return replace(program.lacking(missing), call=call, inputs=flat, model=model)


def _prefer(failed: CaptureError, kind: Any, error: BaseException | None, _: Any) -> None:
    """Where the model cannot be run at all, raise what was wrong with it first."""
    if isinstance(error, Exception) and not isinstance(error, (_Stop, CaptureError)):
        raise failed from error


_OWN = ("past_key_values", "use_cache", "return_dict")
