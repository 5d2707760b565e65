"""Regions of token grids: a region never crosses the border of its 4 x 4 block, so a program takes whole blocks.

A block's 16 locations are held as [4, 4]: its 2 x 2 blocks, and the locations of each. What they are made of is sums
over one or both of these axes; every feature is read once. Which program looks at which block of which image is known
from sizes that are on the CPU (:func:`table`); nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrewrite.passes.dape.regions import sizes

START, ROWS, COLUMNS, FIRST, ACROSS, BLOCKS, MORE = (tl.constexpr(i) for i in range(7))
"""Columns of a table: an image's first location, its grid, its first block, blocks a row, blocks, and one to spare."""

FIELDS = tl.constexpr(7)


def table(lengths: Tensor, grid: Tensor, device: torch.device, more: Sequence[int] | None = None) -> tuple[Tensor, int]:
    """What kernels know of the images, int64 [I, 7] on the device, and the largest number of blocks in an image.

    Args:
        lengths, grid: as for :func:`vlmrewrite.passes.dape.regions.representatives`.
        more: a further number for each image.

    Raises:
        ValueError: an image has not as many tokens as its grid.
    """
    rows, start, first = [], 0, 0
    given = [0] * len(grid) if more is None else more
    for (high, wide), extra in zip(sizes(lengths, grid), given, strict=True):
        across, blocks = -(-wide // 4), -(-high // 4) * -(-wide // 4)
        rows.append((start, high, wide, first, across, blocks, extra))
        start, first = start + high * wide, first + blocks
    host = torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(-1, FIELDS.value)
    return host.to(device, non_blocking=True), max((r[5] for r in rows), default=0)


@triton.jit
def centre(x, n, SCALE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row (or column) of the representative of the block that row ``x`` of ``n`` lies in."""
    first = x // SCALE * SCALE
    return first + (n - first >= 2).to(x.dtype)


@triton.jit
def places(Table, image, number, q, s):  # type: ignore[no-untyped-def]
    """Location ``s`` of 2 x 2 block ``q`` of 4 x 4 block ``number`` of an image, for each of any shape.

    Returns:
        whether it is there, and its number; the numbers of the representatives of its 2 x 2 and of its 4 x 4 block. The
        latter is also that of the 2 x 2 block it lies in.
    """
    at = Table + image * FIELDS
    start, rows, columns = tl.load(at + START), tl.load(at + ROWS), tl.load(at + COLUMNS)
    across = tl.load(at + ACROSS)
    top, left = number // across * 4, number % across * 4
    r, c = top + q // 2 * 2 + s // 2, left + q % 2 * 2 + s % 2
    there = (r < rows) & (c < columns) & (number + 0 * s < tl.load(at + BLOCKS))
    small = start + centre(r, rows, 2) * columns + centre(c, columns, 2)
    return there, start + r * columns + c, small, start + centre(top, rows, 4) * columns + centre(left, columns, 4)


@triton.jit
def block(Table, image, number):  # type: ignore[no-untyped-def]
    """:func:`places` of a whole block, [4, 4]; or of several, their numbers being [N, 1, 1]: [N, 4, 4]."""
    return places(Table, image, number, tl.arange(0, 4)[:, None], tl.arange(0, 4)[None, :])


@triton.jit
def key(x):  # type: ignore[no-untyped-def]
    """An int32 in the order of fp32 numbers; NaN counts as 0, infinities as the largest numbers, -0 as 0."""
    x = tl.where(x == x, x, 0.0)
    x = tl.minimum(tl.maximum(x, -3.4028234663852886e38), 3.4028234663852886e38)
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit(do_not_specialize=["total"])
def _region_owner(Table, Member, Out, total, N: tl.constexpr):  # type: ignore[no-untyped-def]
    image = tl.program_id(1)
    number = tl.program_id(0) * N + tl.arange(0, N)
    there, place, small, large = block(Table, image, number[:, None, None])
    own = tl.load(Member + place, mask=there, other=0) != 0
    near = tl.load(Member + small, mask=there, other=0) != 0
    owner = tl.where(own, place, tl.where(near, small, large))
    home = tl.where(own | near, small, large)
    beyond = (place != owner).to(tl.int32) + (small != home).to(tl.int32)
    flat = tl.reshape(tl.where(there, owner, -1), (N, 16)).to(tl.int32)
    far = tl.reshape(beyond, (N, 16))
    level = tl.max(tl.where(flat[:, :, None] == flat[:, None, :], far[:, None, :], 0), 2)
    place, there = tl.reshape(place, (N, 16)), tl.reshape(there, (N, 16))
    tl.store(Out + place, flat.to(tl.int64), mask=there)
    tl.store(Out + total + place, level.to(tl.int64), mask=there)


def region_owner(member: Tensor, lengths: Tensor, grid: Tensor) -> Tensor:
    """Launcher of :func:`vlmrewrite.passes.dape.regions.region_owner`."""
    images, blocks = table(lengths, grid, member.device)
    out = torch.empty(2, len(member), dtype=torch.int64, device=member.device)
    if blocks:
        at = (triton.cdiv(blocks, 8), len(images))
        _region_owner[at](images, member.contiguous(), out, len(member), N=8)
    return out


@triton.jit(do_not_specialize=["n", "slots", "length", "total", "steps", "sib", "svb"])
def _locate(  # type: ignore[no-untyped-def]
    Index, Valid, Flat, Hidden, Out, Slot, At, n, slots, length, total, steps, channels,
    sib, sin, svb, svn, shb, shn, shc, COPY: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
) -> None:  # fmt: skip
    """Find the slots' tokens among the vision tokens; with COPY, rows of slots that are not valid are moved along."""
    slot = tl.program_id(0) * N + tl.arange(0, N)
    inside = slot < slots
    b, j = (slot // n).to(tl.int64), (slot % n).to(tl.int64)
    token = b * length + tl.load(Index + b * sib + j * sin, mask=inside, other=0)
    good = (tl.load(Valid + b * svb + j * svn, mask=inside, other=0) != 0) & inside
    low, high = tl.zeros((N,), tl.int32), tl.zeros((N,), tl.int32) + total
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(Flat + middle, mask=low < high, other=0) < token
        low = tl.where(before & (low < high), middle + 1, low)
        high = tl.where(before, high, middle)
    low = tl.minimum(low, total - 1)
    tl.store(Slot + low, slot, mask=good)
    tl.store(At + slot, low, mask=inside)
    if COPY:
        left = inside & ~good
        if tl.sum(left.to(tl.int32)) > 0:
            for first in range(0, channels, C):
                c = first + tl.arange(0, C)
                mask = left[:, None] & (c < channels)[None, :]
                x = tl.load(Hidden + (b * shb + j * shn)[:, None] + c[None, :] * shc, mask=mask)
                tl.store(Out + slot.to(tl.int64)[:, None] * channels + c[None, :], x, mask=mask)


def locate(
    index: Tensor, valid: Tensor, flat: Tensor, length: int, hidden: Tensor | None = None, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which slot each vision token has, int32 [F], -1 if none; and which vision token a slot holds, int32 [B, n].

    Args:
        index, valid: of a set, [B, n]. flat: int64 [F], ascending, F > 0. length: T.
        hidden, out: [B, n, C]: where a slot is not valid, ``out`` becomes ``hidden``.
    """
    slot = torch.full((len(flat),), -1, dtype=torch.int32, device=flat.device)
    at = torch.empty(index.shape, dtype=torch.int32, device=flat.device)
    x, y = (flat, flat) if hidden is None or out is None else (hidden, out)
    strides = (0, 0, 0) if hidden is None else hidden.stride()
    if index.numel():
        _locate[(triton.cdiv(index.numel(), 32),)](
            index, valid, flat.contiguous(), x, y, slot, at, index.shape[1], index.numel(), length, len(flat),
            len(flat).bit_length(), 0 if hidden is None else hidden.shape[2],
            *index.stride(), *valid.stride(), *strides, COPY=hidden is not None, N=32, C=128, num_warps=2,
        )  # fmt: skip
    return slot, at


@triton.jit
def spread(there, own, near, place, small, large):  # type: ignore[no-untyped-def]
    """How a block's locations belong to its tokens, all [4, 4].

    Returns:
        0 for a location that is its own token, 1 for one whose 2 x 2 block's token stands for it, 2 for one whose
        4 x 4 block's does; and whether a location is where a 2 x 2 block's token stands, and the 4 x 4 block's.
    """
    level = tl.where(own, 0, tl.where(near, 1, 2))
    return level, there & (place == small), there & (place == large)


@triton.jit
def totals(x, level, mid, top):  # type: ignore[no-untyped-def]
    """Sums over the regions of the block's tokens, at the tokens: x [4, 4, C], the rest [4, 4, 1] -> [4, 4, C]."""
    near = tl.sum(tl.where(level == 1, x, 0.0), 1)
    far = tl.sum(tl.sum(tl.where(level == 2, x, 0.0), 1), 0)
    found = tl.where(level == 0, x, 0.0)
    return found + tl.where(mid, near[:, None, :], 0.0) + tl.where(top, far[None, None, :], 0.0)


@triton.jit
def handed(x, level, mid, top):  # type: ignore[no-untyped-def]
    """For each location, what stands at its token: x [4, 4, C], the rest [4, 4, 1] -> [4, 4, C]."""
    near = tl.sum(tl.where(mid, x, 0.0), 1)
    far = tl.sum(tl.sum(tl.where(top, x, 0.0), 1), 0)
    return tl.where(level == 0, x, tl.where(level == 1, near[:, None, :], far[None, None, :]))


def channels_of(x: Tensor) -> int:
    """Channels that a program of 4 warps takes at a time: 256 bytes of them, since more would not fit its registers."""
    return min(256 // x.element_size(), int(triton.next_power_of_2(x.shape[-1])))


@triton.jit(do_not_specialize=["blocks", "length"])
def _pool(  # type: ignore[no-untyped-def]
    Table, Slot, Flat, X, Out, blocks, length, channels, sxb, sxt, sxc, SUM: tl.constexpr, C: tl.constexpr
) -> None:
    """One 4 x 4 block, C channels: averages of the regions that slots stand for."""
    image, number = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    if number < tl.load(Table + image * FIELDS + BLOCKS):
        there, place, small, large = block(Table, image, number)
        slot = tl.load(Slot + place, mask=there, other=-1)
        near = tl.load(Slot + small, mask=there, other=-1) >= 0
        level, mid, top = spread(there, slot >= 0, near, place, small, large)
        level, mid, top = level[:, :, None], mid[:, :, None], top[:, :, None]
        token = tl.load(Flat + place, mask=there, other=0)
        c = tl.program_id(1) * C + tl.arange(0, C)
        row = token // length * sxb + token % length * sxt
        mask = there[:, :, None] & (c < channels)[None, None, :]
        x = tl.load(X + row[:, :, None] + (c * sxc)[None, None, :], mask=mask, other=0.0).to(SUM)
        count = totals(there[:, :, None].to(SUM), level, mid, top)
        new = totals(x, level, mid, top) / tl.maximum(count, 1.0)
        at = Out + slot.to(tl.int64)[:, :, None] * channels + c[None, None, :]
        tl.store(at, new.to(Out.dtype.element_ty), mask=mask & (slot >= 0)[:, :, None])


def dape_pool(
    hidden: Tensor, index: Tensor, valid: Tensor, stream: Tensor, flat: Tensor, lengths: Tensor, grid: Tensor,
    prompt: Tensor | None = None, *weights: Tensor | None,
) -> Tensor:  # fmt: skip
    """Launcher of ``dape_pool``: three launches; the stream's vision tokens are read once, the result written once.

    The straight-through gate of the weights is 1; it is the backward pass that computes it.
    """
    images, blocks = table(lengths, grid, hidden.device)
    if not blocks or not hidden.numel():
        return hidden.clone(memory_format=torch.contiguous_format)
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    slot, _ = locate(index, valid, flat, stream.shape[1], hidden, out)
    width = channels_of(hidden)
    _pool[(blocks * len(images), triton.cdiv(hidden.shape[2], width))](
        images, slot, flat, stream, out, blocks, stream.shape[1], hidden.shape[2], *stream.stride(),
        SUM=tl.float64 if stream.dtype == torch.float64 else tl.float32, C=width, num_warps=4,
    )  # fmt: skip
    return out
