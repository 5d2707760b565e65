"""Blocks: parameters that a recipe adds to a model, registered on it so that optimizers and state dicts see them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from vlmrewrite.compat import initialise, tree_in
from vlmrewrite.hf import decoder_layers, decoder_of, dequantise

ATTRIBUTE = "vlmrewrite_blocks"
"""Where they stand on a rewritten model, an :class:`vlmrewrite.compat.Apart`."""


class Block(Protocol):
    """Something that can make a module for a model."""

    def build(self, model: nn.Module) -> nn.Module:
        """The module, with the dtype and on the device of the model's decoder."""


@dataclass(frozen=True)
class LayerCopy:
    """A decoder layer of its own: an instance of the class of the model's layer ``layer``.

    Args:
        layer: which one.
        init: ``"copy"`` starts with its parameters, ``"random"`` as the model's class initialises them.
    """

    layer: int
    init: Literal["copy", "random"] = "copy"

    def build(self, model: nn.Module) -> nn.Module:
        """A copy of the layer, trainable; of quantised weights, what they stand for, in the dtype of the others.

        Raises:
            TypeError: a module's weights are not numbers that can be trained, and it is no linear map.
        """
        layer = model.get_submodule(decoder_layers(model)[self.layer])
        shared = {id(m.config): m.config for m in layer.modules() if hasattr(m, "config")}
        block = copy.deepcopy(layer, shared)
        if stored := dequantise(block):
            warnings.warn(
                f"layer {self.layer} is quantised, and numbers of a few bits cannot be trained: its copy holds"
                f" {stored / 2**20:.3g} MiB of plain weights, which start as what the quantised ones stand for",
                stacklevel=2,
            )
        if self.init == "random":
            initialise(block, decoder_of(model))  # as its own class does, whose config is the text's
        return block.requires_grad_(True)

    def __str__(self) -> str:
        return f"a layer like {self.layer} ({self.init})"


@dataclass(frozen=True)
class Weights:
    """Parameters that a pass makes itself.

    Args:
        make: called with the hidden size of the decoder; returns a module whose parameters are float32 on the CPU.
    """

    make: Callable[[int], nn.Module]

    def build(self, model: nn.Module) -> nn.Module:
        """The module, trainable, moved to where the decoder is."""
        layer = model.get_submodule(decoder_layers(model)[0])
        like = next(p for p in layer.parameters() if p.is_floating_point())
        text: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        with torch.device("cpu"):
            made = self.make(int(text.hidden_size))
        return made.to(device=like.device, dtype=like.dtype).requires_grad_(True)

    def __str__(self) -> str:
        return getattr(self.make, "__name__", "weights")


def blocks_of(model: nn.Module) -> nn.ModuleDict | None:
    """The blocks of a rewritten model, by name: those that are in use, if another library has made a copy of them."""
    return tree_in(getattr(model, ATTRIBUTE)) if hasattr(model, ATTRIBUTE) else None


def build(model: nn.Module, blocks: dict[str, Block]) -> nn.ModuleDict:
    """Make all of them, by name."""
    return nn.ModuleDict({name: block.build(model) for name, block in blocks.items()})
