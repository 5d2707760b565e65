"""Private interfaces of torch and transformers that are used, each behind one function."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.config
import torch.fx
import torch.fx.experimental._config
from torch import Tensor


def unshared(buffer: Tensor) -> bool:
    """Whether only the buffer itself, what it shows, and the storage asked here refer to the memory."""
    return bool(torch._C._storage_Use_Count(buffer.untyped_storage()._cdata) <= 3)


@contextlib.contextmanager
def tracing_options() -> Iterator[None]:
    """Dynamo options of a capture: every axis a symbol of its own, Python floats as constants.

    What transformers checks of tensors (``torch_compilable_check``) is left out: the host has compared the number of
    tokens and features, and torch 2.11 cannot trace it.
    """
    with (
        _environment("TRANSFORMERS_DISABLE_TORCH_CHECK", "1"),
        patched(torch.fx.experimental._config, use_duck_shape=False),
        patched(torch._dynamo.config, specialize_float=True),
        _symbols_in_messages(),
    ):
        yield


@contextlib.contextmanager
def patched(config: Any, **options: Any) -> Iterator[None]:
    """What ``config.patch`` does, which makes a class at each call, and every decode step is one."""
    before = {name: getattr(config, name) for name in options}
    try:
        for name, value in options.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _symbols_in_messages() -> Iterator[None]:
    """An f-string in an error message makes Dynamo pin the symbol in it; print the symbol's name instead."""
    from torch._dynamo.variables import lazy

    kind = getattr(lazy, "LazySymNodeFormatString", None)
    if kind is None:
        yield
        return
    before = kind.__repr__

    def as_symbol(self: Any) -> str:
        node = getattr(self.sym_node_var.sym_num, "node", None)
        return str(getattr(node, "expr", self.sym_node_var.sym_num))

    kind.__repr__ = as_symbol
    try:
        yield
    finally:
        kind.__repr__ = before
