"""What kernels are measured on: random inputs of the sizes that operators see in real models, 64 text tokens a row."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmrewrite.ops import KERNELS, REFERENCES

TEXT = 64

KEPT = 4
"""One in so many vision tokens is kept."""

SAMPLED = 192
"""Vision tokens that sampling chooses of an image unless told otherwise, at most a third."""


@dataclass(frozen=True)
class Size:
    """What a model gives its decoder; ``tokens`` are those of the image."""

    name: str
    tokens: int
    hidden: int
    heads: int
    kv_heads: int
    head: int


SIZES = {
    size.name: size
    for size in (
        Size("tiny", 48, 64, 4, 2, 32),
        Size("llava-1.5", 576, 4096, 32, 32, 128),
        Size("llava-next", 2880, 4096, 32, 32, 128),
        Size("qwen2.5-vl", 4096, 3584, 28, 4, 128),
        Size("qwen2.5-vl-16k", 16384, 3584, 28, 4, 128),
    )
}


@dataclass(frozen=True)
class Case:
    """One operator on one set of inputs.

    Attributes:
        kernel: the family.
        name: what is special about the inputs.
        contenders: name -> what prepares the call that is measured.
        bytes: that have to be moved.
        flops: that have to be computed.
        memory: bytes that the inputs and the largest contender take, roughly.
    """

    kernel: str
    name: str
    contenders: dict[str, Callable[[], Callable[[], Any]]]
    bytes: int | None = None
    flops: int | None = None
    memory: int = 0


@dataclass(frozen=True)
class Setting:
    """A size, the rows of a batch, where its tensors are, and how many tokens sampling chooses of an image."""

    size: Size
    batch: int
    device: torch.device
    dtype: torch.dtype
    sampled: int = SAMPLED

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.size.tokens + TEXT

    def random(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def positions(self, every: int = 1) -> Tensor:
        """Ascending positions of the text and of one in ``every`` vision tokens, int64 [B, n]."""
        at = torch.arange(self.length, device=self.device)
        vision = (at >= TEXT // 2) & (at < TEXT // 2 + self.size.tokens)
        return at[~vision | ((at - TEXT // 2) % every == 0)].expand(self.batch, -1).contiguous()

    def padding(self) -> Tensor:
        """Padding bits, bool [B, T]: the first token is padding, in every second row the first half of the text."""
        bits = torch.ones(self.batch, self.length, dtype=torch.bool, device=self.device)
        bits[:, 0] = False
        bits[1::2, : TEXT // 2] = False
        return bits


def operator(name: str, *args: Any, inductor: bool = True) -> dict[str, Callable[[], Callable[[], Any]]]:
    """The contenders that every operator has."""
    op = getattr(torch.ops.vlm, name).default
    found: dict[str, Callable[[], Callable[[], Any]]] = {
        "reference": lambda: functools.partial(REFERENCES[op], *args),
    }
    if op in KERNELS:
        found = {"triton": lambda: functools.partial(KERNELS[op], *args)} | found
    if inductor:
        found["inductor"] = lambda: functools.partial(torch.compile(REFERENCES[op], dynamic=False), *args)
    return found


def size_of(*tensors: Tensor) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)
