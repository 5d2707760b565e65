"""Programs of captured graphs, and capture without installing anything."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmrewrite import capture, hf
from vlmrewrite.capture import Graph, captures_of
from vlmrewrite.compiler import program_of
from vlmrewrite.hf import check_support, grids, refuse_packed, tidy
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.rewrite import Program
from vlmrewrite.runtime.facts import Given, Prompt


def graph_program(graph: Graph) -> Program:
    """The program of a captured graph without passes; analysed once."""

    def make() -> Program:
        assert graph.features is not None, "it has not been run with images"
        return program_of(graph.gm, graph.features, graph.parameters)

    return graph.once("program", make)


def vision_mask(graph: Graph, inputs: Sequence[Any]) -> Tensor:
    """The vision-token mask of a call, bool [B, T], from the graph's inputs."""
    mask: Tensor = graph.once("vision", lambda: graph_program(graph).vision_mask())(*inputs)
    return mask


class _Stop(Exception):
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
    check_support(model)
    capture.register()
    found: list[tuple[Graph, Sequence[Any]]] = []

    def runner(graph: Graph, flat: Sequence[Any]) -> Any:
        found.append((graph, tuple(flat)))
        raise _Stop

    with hf.attention_swapped(model), torch.no_grad():
        kwargs = tidy(model, (), dict(inputs))
        if kwargs.get("use_cache") is False:
            refuse_packed(kwargs)
        given, kwargs = Given.of(kwargs, PositionCache(), Prompt(), [])
        if given is None:
            raise ValueError(f"the inputs hold no image: {', '.join(inputs)}; expected pixel_values or the like")
        for name in ("past_key_values", "use_cache", "return_dict"):
            kwargs.pop(name, None)
        with contextlib.suppress(_Stop):
            captures_of(model).call(runner, model, PositionCache(), kwargs, given.images)
    graph, flat = found[0]
    vision, call = vision_mask(graph, flat), None
    if vision.is_meta:
        grid = grids(model.config, given.images.lengths, None)
        missing = {"grid": grid} if isinstance(grid, str) else {}
    else:
        call, missing = given.call(vision, ["grid"], False, model.config)
    missing["encoder_features"] = "a traced program does not hold them"
    return replace(graph_program(graph).lacking(missing), call=call, inputs=tuple(flat), model=model)
