"""Whether Triton kernels can run on a device, and their launchers, imported when one first runs."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

LEAST = (8, 0)
"""The least compute capability that the kernels are compiled for."""


def interpreted() -> bool:
    """Whether Triton was told to run its kernels in its interpreter, on any device: ``TRITON_INTERPRET=1``."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def kernels_missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, or None if they can."""
    if not _installed():
        return "triton is not installed"
    if interpreted():
        return None
    return _incapable(device)


@functools.cache
def _incapable(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the model is on {device.type}, and Triton kernels need a GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}; expected {LEAST[0]}.{LEAST[1]} or more"
    return None


@functools.cache
def launcher(where: str) -> Callable[..., Any]:
    """The launcher at ``"package.module:function"``."""
    module, name = where.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found
