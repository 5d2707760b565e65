"""Weights of a few bits, of any library's linear maps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def dequantise(block: nn.Module) -> int:
    """Put ``nn.Linear`` in the place of each linear map whose weights cannot be trained, with what they stand for.

    What a map does to the unit vectors says which weights these are, whatever library it is of.

    Args:
        block: changed in place; the dtype is that of its other parameters.

    Returns:
        bytes of the new weights.

    Raises:
        TypeError: a module with such weights is no linear map.
    """
    plain = next((p for p in block.parameters() if _trainable(p)), torch.empty(()))
    stored = 0
    for path, module in [*block.named_modules()]:
        own = dict(module.named_parameters(recurse=False))
        odd = {name: p for name, p in own.items() if not _trainable(p)}
        inside: Any = getattr(module, "in_features", None)
        outside: Any = getattr(module, "out_features", None)
        linear = isinstance(inside, int) and isinstance(outside, int)
        if not own and linear and not any(module.children()):
            odd = dict(module.named_buffers(recurse=False))
        if not odd:
            continue
        (name, like), *_ = odd.items()
        if not linear:
            raise TypeError(
                f"{path}: expected weights that can be trained, or a linear map with in_features and out_features, got"
                f" a {type(module).__name__} whose {name} is a {type(like).__name__} of {like.dtype}"
            )
        how: Any = {"device": like.device, "dtype": plain.dtype}
        made = nn.Linear(inside, outside, getattr(module, "bias", None) is not None, **how)
        nothing = module(torch.zeros(1, inside, **how))
        made.weight.copy_((module(torch.eye(inside, **how)) - nothing).T)
        if made.bias is not None:
            made.bias.copy_(nothing[0])
        block.set_submodule(path, made.train(module.training))
        stored += sum(p.numel() * p.element_size() for p in made.parameters())
    return stored


def chosen(layers: Iterable[nn.Module]) -> bool:
    """Whether somebody has chosen already what of a model learns: weights of its layers do not, and they could.

    Of a module that holds weights of a few bits, its bias says nothing: whoever put it there has frozen both.
    """
    own = [[*m.parameters(recurse=False)] for layer in layers for m in layer.modules()]
    return any(not p.requires_grad for found in own if all(map(_trainable, found)) for p in found)


def _trainable(p: Tensor) -> bool:
    return type(p) in (nn.Parameter, Tensor) and p.is_floating_point()
