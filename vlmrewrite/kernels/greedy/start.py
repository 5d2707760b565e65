"""What greedy sampling starts from, see :mod:`vlmrewrite.kernels.greedy.sample`: means, norms, closest others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def ordered(value):  # type: ignore[no-untyped-def]
    """Fp32 as int32 of the same order; both zeros are equal."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def load(x, row, live, stride_n, stride_c, C: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of x as fp32 [rows, COLS], zero where not live."""
    cols = tl.arange(0, COLS).to(tl.int64)
    mask = live[:, None]
    if C != COLS:
        mask = mask & (cols < C)[None, :]
    at = x + row.to(tl.int64)[:, None] * stride_n + cols[None, :] * stride_c
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _mean_kernel(  # type: ignore[no-untyped-def]
    x, member, spans, out, C, stride_n, stride_c, stride_m, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Mean of each image's members; one program for some columns of an image."""
    image = tl.program_id(0).to(tl.int64)
    start, length = tl.load(spans + 2 * image), tl.load(spans + 2 * image + 1)
    cols = tl.program_id(1).to(tl.int64) * COLS + tl.arange(0, COLS)
    total = tl.zeros([ROWS, COLS], tl.float32)
    members = tl.zeros([ROWS], tl.int32)
    for n in range(0, length, ROWS):
        row = start + n + tl.arange(0, ROWS)
        there = row < start + length
        live = tl.load(member + row * stride_m, mask=there, other=0) != 0
        at = x + row[:, None] * stride_n + cols[None, :] * stride_c
        part = tl.load(at, mask=there[:, None] & (cols < C)[None, :], other=0.0).to(tl.float32)
        total += tl.where(live[:, None], part, 0.0)
        members += live.to(tl.int32)
    mean = tl.div_rn(tl.sum(total, 0), tl.sum(members, 0).to(tl.float32))
    tl.store(out + image * C + cols, mean, mask=cols < C)


@triton.jit
def _distance_kernel(  # type: ignore[no-untyped-def]
    x, mean, spans, distance, square, stride_n, stride_c, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Of each row, |x - mean|^2, ordered, and |x|^2."""
    image = tl.program_id(1).to(tl.int64)
    start, length = tl.load(spans + 2 * image), tl.load(spans + 2 * image + 1)
    if tl.program_id(0) * ROWS < length:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        there = row < length
        values = load(x + start * stride_n, row, there, stride_n, stride_c, C, COLS)
        cols = tl.arange(0, COLS)
        d = values - tl.load(mean + image * C + cols, mask=cols < C, other=0.0)[None, :]
        tl.store(distance + start + row, ordered(tl.sum(d * d, 1)), mask=there)
        tl.store(square + start + row, tl.sum(values * values, 1), mask=there)


@triton.jit
def _norm_kernel(  # type: ignore[no-untyped-def]
    x, inverse, closest, n, stride_n, stride_c, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """1 / norm of each row; and nothing is closest to it yet."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    values = load(x, row, row < n, stride_n, stride_c, C, COLS)
    norm = tl.sqrt_rn(tl.sum(values * values, 1))
    tl.store(inverse + row, tl.div_rn(1.0, tl.maximum(norm, 1e-12)), mask=row < n)
    tl.store(closest + row, tl.full([ROWS], -(2**31), tl.int32), mask=row < n)


@triton.jit
def _closest_kernel(  # type: ignore[no-untyped-def]
    x, member, inverse, closest, spans, side, C, stride_n, stride_c, stride_m,
    BLOCK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The largest cosine of each member to another, ordered. Each pair is computed once, so ties stay ties."""
    image = tl.program_id(1).to(tl.int64)
    start, length = tl.load(spans + 2 * image), tl.load(spans + 2 * image + 1)
    a, b = tl.program_id(0) // side, tl.program_id(0) % side
    if (a <= b) & (b * BLOCK < length):
        i, j = a * BLOCK + tl.arange(0, BLOCK), b * BLOCK + tl.arange(0, BLOCK)
        row, col = start + i, start + j
        cols = tl.arange(0, BLOCK_C).to(tl.int64)
        acc = tl.zeros([BLOCK, BLOCK], tl.float32)
        for c in range(0, C, BLOCK_C):
            some = (c + cols < C)[None, :]
            step = (c + cols)[None, :] * stride_c
            p = tl.load(x + row[:, None] * stride_n + step, mask=(i < length)[:, None] & some, other=0.0)
            q = tl.load(x + col[:, None] * stride_n + step, mask=(j < length)[:, None] & some, other=0.0)
            acc = tl.dot(p, tl.trans(q), acc, input_precision="ieee")
        acc *= tl.load(inverse + row, mask=i < length, other=0.0)[:, None]
        acc *= tl.load(inverse + col, mask=j < length, other=0.0)[None, :]
        left = tl.load(member + row * stride_m, mask=i < length, other=0) != 0
        right = tl.load(member + col * stride_m, mask=j < length, other=0) != 0
        pair = left[:, None] & right[None, :] & (i[:, None] < j[None, :])
        cosine = tl.where(pair, ordered(acc), -(2**31))
        tl.atomic_max(closest + row, tl.max(cosine, 1), mask=left, sem="relaxed")
        tl.atomic_max(closest + col, tl.max(cosine, 0), mask=right, sem="relaxed")


def mean(features: Tensor, member: Tensor, spans: Tensor) -> Tensor:
    """Mean of each image's members.

    Args:
        features: [F, C]. member: bool [F].
        spans: first token and number of tokens of each image, int64 [2 I].

    Returns:
        fp32 [I, C]; undefined for an image without members.
    """
    images, channels = len(spans) // 2, features.shape[1]
    out = torch.empty(images, channels, dtype=torch.float32, device=features.device)
    _mean_kernel[images, triton.cdiv(channels, 64)](
        features, member, spans, out, channels, *features.stride(), member.stride(0), ROWS=64, COLS=64, num_warps=8
    )
    return out


def aligned(x: Tensor) -> bool:
    """Whether the compiler can load the rows of x [F, C] in vectors; where not, pointers fill the registers."""
    return x.stride(1) == 1 and x.stride(0) % 16 == 0


def _rows(features: Tensor, cols: int) -> int:
    """Rows of ``cols`` elements that a program loads at a time."""
    return max(1, min(64, (2**14 if aligned(features) else 2**13) // cols))


def distances(features: Tensor, member: Tensor, spans: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The distance of each token to the mean of its image's members.

    Args:
        features, member, spans, longest: as for :func:`closest`.

    Returns:
        The squared distances as integers of the same order, int32 [F]; and the square of each token's norm, fp32 [F].
    """
    tokens, channels = features.shape
    cols = max(16, triton.next_power_of_2(channels))
    rows = _rows(features, cols)
    out = torch.empty(tokens, dtype=torch.int32, device=features.device)
    square = torch.empty(tokens, dtype=torch.float32, device=features.device)
    _distance_kernel[triton.cdiv(longest, rows), len(spans) // 2](
        features, mean(features, member, spans), spans, out, square, *features.stride(),
        C=channels, ROWS=rows, COLS=cols, num_warps=8,
    )  # fmt: skip
    return out, square


def closest(features: Tensor, member: Tensor, spans: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The largest cosine of each member to another one of its image.

    Args:
        features: [F, C], not float64. member: bool [F].
        spans: first token and number of tokens of each image, int64 [2 I].
        longest: tokens of the largest image.

    Returns:
        The cosines as integers of the same order, int32 [F], of which those of tokens that have no other are the
        least; and 1 / norm of each token, at most 1e12, fp32 [F].
    """
    (tokens, channels), images = features.shape, len(spans) // 2
    strides = features.stride()
    out = torch.empty(tokens, dtype=torch.int32, device=features.device)
    inverse = torch.empty(tokens, dtype=torch.float32, device=features.device)
    cols = max(16, triton.next_power_of_2(channels))
    rows = _rows(features, cols)
    _norm_kernel[(triton.cdiv(tokens, rows),)](
        features, inverse, out, tokens, *strides, C=channels, ROWS=rows, COLS=cols, num_warps=8
    )
    single = features.dtype == torch.float32
    block = 128 if longest > 2048 and aligned(features) and not single else 64
    deep = 64 if not single else 32 if aligned(features) else 16
    side = triton.cdiv(longest, block)
    _closest_kernel[side * side, images](
        features, member, inverse, out, spans, side, channels, *strides, member.stride(0),
        BLOCK=block, BLOCK_C=deep, num_warps=8, num_stages=3, maxnreg=255,
    )  # fmt: skip
    return out, inverse
