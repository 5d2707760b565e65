"""Rows of several tensors in one launch, and rows written over a copy of a tensor in one launch.

Both move bytes: a row is moved in pieces of the largest power of two of bytes, up to 16, that its address, strides and
width allow, whatever its dtype; since that is known, sizes are not specialised on, and a new length compiles nothing.
A program moves one tile of :data:`TILE` bytes, so that even the hidden states of one
image give a GPU many programs to hide latency behind.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrewrite.ops import select

TILE, PIECES = 8192, 2048
"""Bytes that one program moves, 4 loads of 16 bytes for each of its 128 threads; and pieces, at most."""

MOST = 6
"""Tensors in one launch."""

FAN = 128
"""Entries of the index that one step of the search looks at."""


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    x, out, index, tile, n, outer, width, sxb, sxo, sxt, sxi, sib, sin,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """Gather one tile. Strides and the width count units; for units of 16 bytes, pieces are half a unit."""
    VEC: tl.constexpr = 2 if UNIT == 16 else 1
    PIECE: tl.constexpr = tl.int64 if UNIT >= 8 else tl.int32 if UNIT == 4 else tl.int16 if UNIT == 2 else tl.int8
    across = tl.cdiv(width * VEC, COLS)
    down = tl.cdiv(n, ROWS)
    cols = (tile % across) * COLS + tl.arange(0, COLS)
    tile = tile // across
    rows = (tile % down) * ROWS + tl.arange(0, ROWS)
    tile = (tile // down).to(tl.int64)
    b = tile // outer
    at = tl.load(index + b * sib + rows.to(tl.int64) * sin, mask=rows < n, other=0)
    mask = (rows < n)[:, None] & (cols < width * VEC)[None, :]
    source = x.to(tl.pointer_type(PIECE)) + (b * sxb + (tile - b * outer) * sxo) * VEC
    source += (at * sxt)[:, None] * VEC + cols.to(tl.int64)[None, :] * sxi
    target = out.to(tl.pointer_type(PIECE)) + (tile * n + rows)[:, None] * width * VEC + cols[None, :]
    tl.store(target, tl.load(source, mask=mask, other=0), mask=mask)


NUMBERS = [f"{name}_{i}" for name in ("end", "outer", "width", "sxb", "sxo", "sxt") for i in range(MOST)]


@triton.jit(do_not_specialize=["n", "sib", *NUMBERS])
def _gather(  # type: ignore[no-untyped-def]
    xs, outs, sxi, index, sib, sin, n,
    end_0, end_1, end_2, end_3, end_4, end_5,
    outer_0, outer_1, outer_2, outer_3, outer_4, outer_5,
    width_0, width_1, width_2, width_3, width_4, width_5,
    sxb_0, sxb_1, sxb_2, sxb_3, sxb_4, sxb_5,
    sxo_0, sxo_1, sxo_2, sxo_3, sxo_4, sxo_5,
    sxt_0, sxt_1, sxt_2, sxt_3, sxt_4, sxt_5,
    UNITS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
) -> None:  # fmt: skip
    """Programs ``end[i - 1]`` to ``end[i]`` move the tiles of tensor i.

    Numbers that come in a tuple would be specialised on, whatever ``do_not_specialize`` says.
    """
    end = (end_0, end_1, end_2, end_3, end_4, end_5)
    outer = (outer_0, outer_1, outer_2, outer_3, outer_4, outer_5)
    width = (width_0, width_1, width_2, width_3, width_4, width_5)
    sxb = (sxb_0, sxb_1, sxb_2, sxb_3, sxb_4, sxb_5)
    sxo = (sxo_0, sxo_1, sxo_2, sxo_3, sxo_4, sxo_5)
    sxt = (sxt_0, sxt_1, sxt_2, sxt_3, sxt_4, sxt_5)
    pid = tl.program_id(0)
    first = 0
    for i in tl.static_range(len(xs)):
        if (pid >= first) & (pid < end[i]):
            _move(
                xs[i], outs[i], index, pid - first, n, outer[i], width[i], sxb[i], sxo[i], sxt[i], sxi[i], sib, sin,
                UNITS[i], ROWS[i], COLS[i],
            )  # fmt: skip
        first = end[i]


def gather(xs: list[Tensor], dims: list[int], index: Tensor) -> list[Tensor]:
    """Launcher of :func:`vlmrewrite.ops.selection.gather`; a launch moves up to :data:`MOST` tensors.

    Raises:
        ValueError: there are not as many dims as tensors, or a batch that fits neither 1 nor the index's.
    """
    n = index.shape[1]
    outs, slots = [], []
    for x, dim in zip(xs, dims, strict=True):
        dim = dim % x.dim()
        if dim == 0 or x.shape[0] not in (1, index.shape[0]):
            raise ValueError(
                f"selecting from {tuple(x.shape)} at {dim} by an index {tuple(index.shape)}; expected tokens behind a"
                f" batch of 1 or {index.shape[0]}"
            )
        x = x.resolve_conj().resolve_neg()
        out = x.new_empty(index.shape[0], *x.shape[1:dim], n, *x.shape[dim + 1 :])
        outs.append(out)
        if x.is_complex():  # which Triton does not know
            x, out = torch.view_as_real(x), torch.view_as_real(out)
        strides = _merged(x, dim)
        if strides is None:
            out.copy_(select(x, index, dim))
            continue
        if out.numel():
            slots.append(_slot(x, out, dim, strides, n))
    for i in range(0, len(slots), MOST):
        _launch(slots[i : i + MOST], index)
    return outs


def _launch(slots: list[tuple[Any, ...]], index: Tensor) -> None:
    sizes, rest = [s[0] for s in slots], zip(*(s[1:] for s in slots), strict=True)
    xs, outs, *numbers, sxi, units, rows, cols = rest
    ends = tuple(sum(sizes[: i + 1]) for i in range(len(sizes)))
    padded = [x for given in (ends, *numbers) for x in (*given, *[0] * (MOST - len(slots)))]
    _gather[(ends[-1],)](
        xs, outs, sxi, index, *index.stride(), index.shape[1], *padded,
        UNITS=units, ROWS=rows, COLS=cols, num_warps=4,
    )  # fmt: skip


def _slot(x: Tensor, out: Tensor, dim: int, strides: tuple[int, int], n: int) -> tuple[Any, ...]:
    """Programs that a tensor needs, and what the kernel is told of it."""
    outer, inner = math.prod(x.shape[1:dim]), math.prod(x.shape[dim + 1 :])
    sxb = x.stride(0) if x.shape[0] > 1 else 0
    unit, width, rows, cols = _tile(inner, strides[1], x.element_size(), n, x, sxb, strides[0], x.stride(dim))
    sxb, sxo, sxt = (s * x.element_size() // unit for s in (sxb, strides[0], x.stride(dim)))
    pieces = width * (2 if unit == 16 else 1)
    programs = len(out) * outer * -(-n // rows) * -(-pieces // cols)
    return programs, x, out, outer, width, sxb, sxo, sxt, strides[1], unit, rows, cols


def _tile(inner: int, stride: int, size: int, n: int, *aligned: Tensor | int) -> tuple[int, int, int, int]:
    """Bytes of a unit, units of a row, and rows and pieces of a tile.

    Args:
        inner, stride: elements of a row, and from one to the next. size: of an element, bytes. n: rows.
        aligned: tensors whose addresses, and strides in elements that, are multiples of a unit.
    """
    unit = size
    if stride == 1:
        bytes_of = (x.data_ptr() if isinstance(x, Tensor) else x * size for x in aligned)
        unit = math.gcd(16, inner * size, *bytes_of)
    width = inner * size // unit
    piece = min(unit, 8)
    most = min(TILE // piece, PIECES)
    cols = min(triton.next_power_of_2(width * unit // piece), most)
    return unit, width, min(triton.next_power_of_2(n), most // cols), cols


def _merged(x: Tensor, dim: int) -> tuple[int, int] | None:
    """The strides of the axes between the batch and ``dim`` taken as one, and of those behind; None if they vary."""
    outer, inner = _stride(x, range(1, dim), 0), _stride(x, range(dim + 1, x.dim()), 1)
    return None if outer is None or inner is None else (outer, inner)


def _stride(x: Tensor, axes: range, default: int) -> int | None:
    found, size = None, 1
    for d in reversed([d for d in axes if x.shape[d] != 1]):
        if found is None:
            found = x.stride(d)
        elif x.stride(d) != found * size:
            return None
        size *= x.shape[d]
    return default if found is None else found


@triton.jit(do_not_specialize=["length", "n", "width", "sfb", "sft", "spb", "spt", "sib", "svb"])
def _restore(  # type: ignore[no-untyped-def]
    full, part, out, index, valid, length, n, width,
    sfb, sft, sfc, spb, spt, spc, sib, sin, svb, svn,
    UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, FAN: tl.constexpr, LEVELS: tl.constexpr,
) -> None:  # fmt: skip
    """One tile of the output, each row from ``part`` or from ``full``.

    The first entry of the ascending index that is not before the tile is found by counting, FAN entries at a step: two
    dependent loads for 16384 entries, where halving would take 14. That of row r is among the ROWS from there on.
    """
    VEC: tl.constexpr = 2 if UNIT == 16 else 1
    PIECE: tl.constexpr = tl.int64 if UNIT >= 8 else tl.int32 if UNIT == 4 else tl.int16 if UNIT == 2 else tl.int8
    across = tl.cdiv(width * VEC, COLS)
    down = tl.cdiv(length, ROWS)
    tile = tl.program_id(0)
    cols = (tile % across) * COLS + tl.arange(0, COLS)
    tile = tile // across
    first = (tile % down) * ROWS
    b = (tile // down).to(tl.int64)
    index += b * sib
    start = 0
    step = 1
    for _ in tl.static_range(LEVELS - 1):
        step *= FAN
    for _ in tl.static_range(LEVELS):
        at = start + (tl.arange(0, FAN) + 1) * step - 1
        seen = tl.load(index + at.to(tl.int64) * sin, mask=at < n, other=length)
        start += tl.sum((seen < first).to(tl.int32)) * step
        step = step // FAN
    rows = first + tl.arange(0, ROWS)
    slots = start + tl.arange(0, ROWS)
    there = slots < n
    token = tl.load(index + slots.to(tl.int64) * sin, mask=there, other=-1)
    good = tl.load(valid + b * svb + slots.to(tl.int64) * svn, mask=there, other=0) != 0
    hit = (token[None, :] == rows[:, None]) & good[None, :]
    slot = tl.max(tl.where(hit, slots[None, :], -1), 1)
    new = (slot >= 0)[:, None]
    inside = (rows < length)[:, None] & (cols < width * VEC)[None, :]
    wide = cols.to(tl.int64)[None, :]
    old_at = full.to(tl.pointer_type(PIECE)) + (b * sfb + rows.to(tl.int64) * sft)[:, None] * VEC + wide * sfc
    new_at = part.to(tl.pointer_type(PIECE)) + (b * spb + slot.to(tl.int64) * spt)[:, None] * VEC + wide * spc
    old = tl.load(old_at, mask=inside & ~new, other=0)
    row = tl.load(new_at, mask=inside & new, other=0)
    target = out.to(tl.pointer_type(PIECE)) + (b * length + rows)[:, None] * width * VEC + cols[None, :]
    tl.store(target, tl.where(new, row, old), mask=inside)


def restore(full: Tensor, part: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Launcher of :func:`vlmrewrite.ops.selection.restore`: every row of the result is read and written once.

    Args:
        index: int64 [B, n], ascending in each row, no token twice.

    Raises:
        ValueError: the dtypes of ``full`` and ``part`` differ.
    """
    if full.dtype != part.dtype:
        raise ValueError(f"restoring rows of {part.dtype} to {full.dtype}; expected one dtype")
    batch, length, channels = full.shape
    n, size = index.shape[1], full.element_size()
    out = torch.empty_like(full, memory_format=torch.contiguous_format)
    if not out.numel():
        return out
    dense = max(full.stride(2), part.stride(2)) if channels > 1 else 1
    outer = (full.stride(0), full.stride(1), part.stride(0), part.stride(1))
    unit, width, rows, cols = _tile(channels, dense, size, length, full, part, *outer)
    inner = (1, 1) if channels == 1 or dense == 1 else (full.stride(2), part.stride(2))
    sfb, sft, spb, spt = (s * size // unit for s in outer)
    rows = min(rows, 32)
    levels = 1
    while FAN**levels < n:
        levels += 1
    grid = batch * -(-length // rows) * -(-width * (2 if unit == 16 else 1) // cols)
    _restore[(grid,)](
        full, part, out, index, valid, length, n, width,
        sfb, sft, inner[0], spb, spt, inner[1], *index.stride(), *valid.stride(),
        UNIT=unit, ROWS=rows, COLS=cols, FAN=FAN, LEVELS=levels, num_warps=4,
    )  # fmt: skip
    return out
