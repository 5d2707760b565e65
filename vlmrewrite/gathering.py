"""The tokens of a set from several tensors at once: hidden states, rope tables, positions, masks."""

from __future__ import annotations

from torch import Tensor

from vlmrewrite.dialect import select
from vlmrewrite.operators import define


def gather(xs: list[Tensor], dims: list[int], index: Tensor) -> list[Tensor]:
    """:func:`vlmrewrite.dialect.select` of each of several tensors, for the same tokens.

    Args:
        xs: each [B or 1, ..., T, ...], of any dtype and strides.
        dims: where T is in each of them, at least 1.
        index: int64 [B or 1, n], all in [0, T).

    Returns:
        for each, [B, ..., n, ...], contiguous.
    """
    return [select(x, index, dim).contiguous() for x, dim in zip(xs, dims, strict=True)]


def _fake(xs: list[Tensor], dims: list[int], index: Tensor) -> list[Tensor]:
    shapes = ((index.shape[0], *x.shape[1:]) for x in xs)
    at = (dim % x.dim() for x, dim in zip(xs, dims, strict=True))
    return [x.new_empty(*s[:d], index.shape[1], *s[d + 1 :]) for x, s, d in zip(xs, shapes, at, strict=True)]


define(
    "gather(Tensor[] xs, int[] dims, Tensor index) -> Tensor[]",
    gather,
    kernel="vlmrewrite.kernels.gather:gather",
    kernel_fake=_fake,
    backward=True,
)
