"""Weights of a few bits, of any library's linear maps."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn


@torch.no_grad()
def dequantise(block: nn.Module) -> int:
    """Put ``nn.Linear`` in the place of each linear map whose weights cannot be trained, with what they stand for.

    And of each that is made of several, as one with an adapter is. What a map does to the unit vectors says which
    weights these are, whatever library it is of.

    Args:
        block: changed in place; the dtype is that of its other parameters.

    Returns:
        bytes of the new weights that stand for some that cannot be trained.

    Raises:
        TypeError: a module with such weights is no linear map.
    """
    several = [path for path, m in block.named_modules() if any(m.children()) and _is_linear(m)]
    inside_these = tuple(f"{path}." for path in several)
    plain = [p for name, p in block.named_parameters() if _trainable(p) and not name.startswith(inside_these)]
    like = next(iter(plain or filter(_trainable, block.parameters())), torch.empty(()))
    stored = 0
    for path, module in [*block.named_modules()]:
        if path.startswith(inside_these):
            continue
        own = dict(module.named_parameters(recurse=False))
        if path in several:
            own = dict(module.named_parameters())
        odd = {name: p for name, p in own.items() if not _trainable(p)}
        linear = has_sizes(module)
        if not own and linear and (path in several or not any(module.children())):
            odd = dict(module.named_buffers())
        if not odd and path not in several:
            continue
        (name, first), *_ = (odd or own).items()
        if not linear:
            raise TypeError(
                f"{path}: expected weights that can be trained, or a linear map with in_features and out_features, got"
                f" a {type(module).__name__} whose {name} is a {type(first).__name__} of {first.dtype}"
            )
        how: Any = {"device": first.device, "dtype": like.dtype}
        inside: Any = module.in_features
        made = nn.Linear(inside, cast(Any, module).out_features, getattr(module, "bias", None) is not None, **how)
        with _without_dropout(module):
            nothing = module(torch.zeros(1, inside, **how))
            made.weight.copy_((module(torch.eye(inside, **how)) - nothing).T)
        if made.bias is not None:
            made.bias.copy_(nothing[0])
        block.set_submodule(path, made.train(module.training))
        stored += bool(odd) * sum(p.numel() * p.element_size() for p in made.parameters())
    return stored


def has_sizes(module: nn.Module) -> bool:
    """Whether a module says how many features go in, and come out, as a linear map does."""
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def _is_linear(module: nn.Module) -> bool:
    """Whether a module has the sizes of a linear map, and does what one does, but for the rounding of a few bits."""
    first = next(itertools.chain(module.parameters(), module.buffers()), None)
    if not has_sizes(module) or first is None:
        return False
    inside: Any = module.in_features
    plain = next((p for p in module.parameters() if _trainable(p)), torch.empty(()))
    x = torch.randn(9, inside, generator=torch.Generator().manual_seed(0)).to(first.device, plain.dtype)
    with _without_dropout(module):
        nothing, each, sums = module(torch.cat([0 * x[:1], x, x[1:] + x[:-1]])).split([1, 9, 8])
    return bool((sums + nothing - each[1:] - each[:-1]).abs().max() < (each - nothing).abs().max() / 8)


@contextlib.contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """While the block runs, what has no parameters is not in training; the others may do other things in eval mode."""
    asked = [m for m in module.modules() if m.training and not any(True for _ in m.parameters())]
    for m in asked:
        m.training = False
    try:
        yield
    finally:
        for m in asked:
            m.training = True


def chosen(layers: Iterable[nn.Module]) -> bool:
    """Whether somebody has chosen already what of a model learns: weights of its layers do not, and they could.

    Of a module that holds weights of a few bits, its bias says nothing: whoever put it there has frozen both.
    """
    own = [[*m.parameters(recurse=False)] for layer in layers for m in layer.modules()]
    return any(not p.requires_grad for found in own if all(map(_trainable, found)) for p in found)


def _trainable(p: Tensor) -> bool:
    return type(p) in (nn.Parameter, Tensor) and p.is_floating_point()
