"""The text decoder of a model: its layers, their parameters, and the configs its modules read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx
from torch import nn


def decoder_layers(model: nn.Module) -> list[str]:
    """Names of the decoder's layers, as submodules of the model.

    Raises:
        ValueError: its text decoder has no list of as many modules as its config names layers.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    depth = model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[union-attr, operator]
    inside = {id(m) for m in decoder.modules()}
    for name, module in model.named_modules():
        if id(module) in inside and isinstance(module, nn.ModuleList) and len(module) == depth:
            return [f"{name}.{i}" for i in range(depth)]
    raise ValueError(f"{type(decoder).__name__} has no list of {depth} layers; expected one to copy a layer from")


def parameter_inputs(
    model: nn.Module, gm: torch.fx.GraphModule, inputs: Sequence[object]
) -> dict[str, tuple[int, str]]:
    """For each input of a captured graph that is a decoder layer's parameter, the layer and the name within it."""
    known = {
        id(p): (i, name)
        for i, layer in enumerate(decoder_layers(model))
        for name, p in model.get_submodule(layer).named_parameters()
    }
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    return {name: known[id(x)] for name, x in zip(names, inputs, strict=True) if id(x) in known}


IMPLEMENTATION = "vlmrewrite"


def decoder_configs(model: torch.nn.Module) -> list[Any]:
    """The distinct config objects that the text decoder's modules read their attention implementation from."""
    decoder = model.get_decoder()  # type: ignore[operator]
    found = {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}
    text = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    return list((found | {id(text): text}).values())


@contextlib.contextmanager
def attention_swapped(model: torch.nn.Module, name: str = IMPLEMENTATION) -> Iterator[None]:
    """Temporarily use another attention implementation in the text decoder only."""
    before = [(c, c._attn_implementation_internal) for c in decoder_configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, value in before:
            config._attn_implementation_internal = value
