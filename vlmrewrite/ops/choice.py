"""Which implementation an operator gets on a device, and why; decided once, before anything runs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlmrewrite.ops.device import interpreted, kernels_missing

Kernels = Literal["auto", "reference", "triton"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

LARGEST_HEAD = 256

DECODE = 16
"""Most queries a row that split-K decoding takes; beyond, there are enough blocks of queries to fill a GPU."""


@dataclass(frozen=True)
class Choice:
    """What a node became: ``kernel`` is ``"triton"``, ``"sdpa"`` or ``"reference"``."""

    kernel: str
    why: str


def choose(kernels: str, device: torch.device) -> Choice:
    """What operators that have a Triton kernel become on a device.

    Args:
        kernels: ``"reference"``; ``"triton"``, on a GPU, or under ``TRITON_INTERPRET=1`` anywhere; or ``"auto"``, the
            kernels on a GPU.

    Raises:
        ValueError: not a known choice.
        RuntimeError: ``"triton"``, and the device cannot run it.
    """
    if kernels not in ("auto", "reference", "triton"):
        raise ValueError(f"kernels={kernels!r}; expected 'auto', 'reference' or 'triton'")
    return _chosen(kernels, device, interpreted())


@functools.lru_cache(maxsize=64)
def _chosen(kernels: str, device: torch.device, by_interpreter: bool) -> Choice:
    if kernels == "reference":
        return Choice("reference", "plain PyTorch was asked for")
    reason = kernels_missing(device)
    if kernels == "triton":
        if reason is not None:
            raise RuntimeError(f"kernels='triton' was asked for, and {reason}; use 'auto' or 'reference'")
        return Choice("triton", "in Triton's interpreter" if by_interpreter else "asked for")
    if reason is None and device.type != "cuda":
        reason = f"the model is on {device.type}, and Triton's interpreter runs when asked for by name"
    return Choice("triton", f"on {device.type}") if reason is None else Choice("reference", f"plain PyTorch: {reason}")


def unfit(q: Tensor | None, v: Tensor | None, dropout: float, kernels: Kernels, where: str) -> str | None:
    """Why an attention cannot run as a kernel, or None.

    Args:
        q, v: [..., D]; they may be fake, or None where not known.
        dropout: of its weights.
        kernels: what was asked for.
        where: the attention, for the error.

    Raises:
        RuntimeError: it cannot, and kernels were asked for by name.
    """
    reason = _unfit(q, v, dropout)
    if reason is not None and kernels == "triton":
        raise RuntimeError(f"kernels='triton' was asked for, and {where} cannot: {reason}; use 'auto'")
    return reason


def _unfit(q: Tensor | None, v: Tensor | None, dropout: float) -> str | None:
    if dropout:
        return f"its dropout is {dropout}, and the kernel has none"
    for x in (q, v):
        if x is not None and x.dtype not in DTYPES:
            return f"its dtype is {str(x.dtype).removeprefix('torch.')}; the kernel takes float16, bfloat16 and float32"
        if x is not None and isinstance(x.shape[-1], int) and x.shape[-1] > LARGEST_HEAD:
            return f"its head size is {x.shape[-1]}; the kernel takes at most {LARGEST_HEAD}"
    return None


Backend = Literal["auto", "eager", "inductor", "inductor-whole"]

Running = Literal["eager", "inductor", "inductor-whole"]
"""What runs a graph: itself, Inductor, which is given each kind of layer once, or Inductor, given the whole graph."""


def resolve(backend: Backend, device: torch.device) -> Running:
    """What ``"auto"`` means on a device: Inductor on a GPU."""
    if backend == "auto":
        return "inductor" if device.type == "cuda" else "eager"
    return backend
