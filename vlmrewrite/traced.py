"""Models behind Dynamo: each captured graph is analysed once and outlives the recipe that first needed it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from vlmrewrite import capture
from vlmrewrite.admission import admit
from vlmrewrite.cache import PositionCache
from vlmrewrite.call import Call
from vlmrewrite.encode import Encoded, encode_images, encoded_images
from vlmrewrite.program import Program, program_of


class Graph:
    """One captured graph of a model; analysed once, rewritten once for each session."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self.gm = gm
        self._program: Program | None = None
        self._missing: tuple[str, ...] | None = None

    def program(self, missing: dict[str, str]) -> Program:
        """The graph's program without passes; ``missing`` as for :func:`vlmrewrite.program.program_of`."""
        if self._program is None or self._missing != tuple(missing):
            self._program, self._missing = program_of(self.gm, missing), tuple(missing)
        return self._program


class Traced:
    """A model behind Dynamo. Outlives a session, so that applying again need not capture again."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.call = capture.TracedCall(forward, self._new_graph)
        self.runner: Callable[[Graph, Sequence[Any]], Any] | None = None

    def _new_graph(self, gm: torch.fx.GraphModule) -> Callable[..., Any]:
        graph = Graph(gm)

        def run(*inputs: Any) -> Any:
            assert self.runner is not None
            return self.runner(graph, inputs)

        return run

    def run(
        self,
        runner: Callable[[Graph, Sequence[Any]], Any],
        model: nn.Module,
        cache: PositionCache,
        images: Encoded,
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the captured forward; ``runner(graph, inputs)`` does the work of each graph."""
        before, self.runner = self.runner, runner
        try:
            return self.call(model, cache, images.features, images.as_list, kwargs)
        finally:
            self.runner = before


TRACED: weakref.WeakKeyDictionary[nn.Module, Traced] = weakref.WeakKeyDictionary()


def traced(model: nn.Module) -> Traced:
    """The model's captures; new if its class's forward has been exchanged since."""
    forward = type(model).forward
    if model not in TRACED or TRACED[model].forward is not forward:
        TRACED[model] = Traced(forward)
    return TRACED[model]


@functools.lru_cache(maxsize=64)
def _argument_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(forward).parameters)[1:]


def tidy(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name, images encoded, and None in place of a mask without padding.

    Raises:
        NotImplementedError: attentions or hidden states are asked for, or there is a video.
    """
    kwargs = dict(zip(_argument_names(type(model).forward), args, strict=False)) | kwargs
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            raise NotImplementedError(
                f"{name}=True is not available while a recipe is applied; restore the model first"
            )
        kwargs.pop(name, None)
    kwargs = encode_images(model, kwargs)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.is_meta and bool(mask.all()):
        kwargs["attention_mask"] = None
    return kwargs


class _Captured(Exception):
    """Raised in place of running a graph that is only to be captured."""


def trace(model: nn.Module, inputs: dict[str, Any]) -> Program:
    """Capture a model's forward for some inputs; nothing is installed, and the decoder is not run.

    Args:
        model: an unmodified model, on any device (the meta device too).
        inputs: what the model's forward takes, with an image.

    Raises:
        ValueError: the inputs hold no image, or the graph could not be recognised.
        RuntimeError: the forward could not be captured as one graph.
    """
    admit(model)
    capture.register()
    found: list[tuple[Graph, Sequence[Any]]] = []

    def runner(graph: Graph, flat: Sequence[Any]) -> Any:
        found.append((graph, tuple(flat)))
        raise _Captured

    with capture.attention_swapped(model), torch.no_grad():
        kwargs = tidy(model, (), dict(inputs))
        output = (kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
        if output is None:
            raise ValueError(f"the inputs hold no image: {', '.join(inputs)}; expected pixel_values or the like")
        for name in ("past_key_values", "use_cache", "return_dict"):
            kwargs.pop(name, None)
        images = encoded_images(output)
        with contextlib.suppress(_Captured):
            traced(model).run(runner, model, PositionCache(), images, kwargs)
    graph, flat = found[0]
    program = graph.program({"encoder_features": "a traced program does not hold them"})
    mask = kwargs.get("attention_mask")
    vision = program.vision_mask()(*flat)
    padding = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    call = None if vision.is_meta else Call(vision, padding, images.lengths)
    return replace(program, call=call, inputs=tuple(flat))
