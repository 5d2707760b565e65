"""Regions in focus, and what their tokens take up of their locations' features."""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrewrite.passes.dape.kernels.quadtree import cut
from vlmrewrite.passes.dape.kernels.regions import (
    BLOCKS,
    COLUMNS,
    FIELDS,
    MORE,
    ROWS,
    START,
    block,
    channels_of,
    handed,
    key,
    locate,
    spread,
    table,
    totals,
)


@triton.jit
def _value(  # type: ignore[no-untyped-def]
    Table, Slot, Attention, X, Out, channels, sxf, sxc, saf, SUM: tl.constexpr, C: tl.constexpr
) -> None:
    """One 4 x 4 block: keys of each token's attention times the variance inside its region."""
    image, number = tl.program_id(1), tl.program_id(0)
    if number < tl.load(Table + image * FIELDS + BLOCKS):
        there, place, small, large = block(Table, image, number)
        own = tl.load(Slot + place, mask=there, other=-1) >= 0
        near = tl.load(Slot + small, mask=there, other=-1) >= 0
        level, mid, top = spread(there, own, near, place, small, large)
        level, mid, top = level[:, :, None], mid[:, :, None], top[:, :, None]
        count = tl.maximum(totals(there[:, :, None].to(SUM), level, mid, top), 1.0)
        error = tl.zeros((4, 4), SUM)
        for first in range(0, channels, C):
            c = first + tl.arange(0, C)
            mask = there[:, :, None] & (c < channels)[None, None, :]
            x = tl.load(X + (place * sxf)[:, :, None] + (c * sxc)[None, None, :], mask=mask, other=0.0).to(SUM)
            away = x - handed(totals(x, level, mid, top) / count, level, mid, top)
            error += tl.sum(tl.where(mask, away * away, 0.0), 2)
        error = totals(error[:, :, None] / channels, level, mid, top) / count
        paid = tl.load(Attention + place * saf, mask=there & own, other=0.0)[:, :, None]
        keys = key(tl.where(own[:, :, None], paid * error, 0.0).to(tl.float32))
        tl.store(Out + place[:, :, None], keys, mask=there[:, :, None])


@triton.jit(do_not_specialize=["bits", "limit"])
def _focus(Table, Slot, Key, Order, One, Found, bits, limit, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where an image's regions in focus end: the share of its tokens, rounded half to even, with the largest keys."""
    image = tl.program_id(0)
    at = Table + image * FIELDS
    first, count = tl.load(at + START), (tl.load(at + ROWS) * tl.load(at + COLUMNS)).to(tl.int32)
    tokens = tl.zeros((N,), tl.int32)
    for i in range(0, count, N):
        j = i + tl.arange(0, N)
        tokens += (tl.load(Slot + first + j, mask=j < count, other=-1) >= 0).to(tl.int32)
    wanted = tl.sum(tokens).to(tl.float64) * tl.load(at + MORE).to(tl.float64, bitcast=True)
    whole = wanted.to(tl.int32)
    rest = wanted - whole.to(tl.float64)
    whole += ((rest > 0.5) | ((rest == 0.5) & (whole % 2 == 1))).to(tl.int32)
    value, last, _ = cut(Key, Order, One, first, count, whole, bits, limit, N)
    tl.store(Found + image * 2, value)
    tl.store(Found + image * 2 + 1, last.to(tl.int64))


@triton.jit(do_not_specialize=["images", "n", "svb"])
def _attend(  # type: ignore[no-untyped-def]
    Table, Slot, At, Valid, Key, Found, Asked, Told, Seen, Chosen, images, n, scale, svb, svn,
    D: tl.constexpr, BLOCK_D: tl.constexpr, IMAGES: tl.constexpr,
) -> None:  # fmt: skip
    """One slot: if its region is in focus, softmax over the region's locations, and the values averaged by it."""
    slot = tl.program_id(0)
    token = tl.load(At + slot).to(tl.int64)
    other = tl.arange(0, IMAGES)
    starts = tl.load(Table + other * FIELDS + START, mask=other < images, other=2**62)
    image = tl.sum((starts <= token).to(tl.int32)) - 1
    mine, value = tl.load(Key + token), tl.load(Found + image * 2)
    last = tl.load(Found + image * 2 + 1)
    chosen = (mine > 0) & ((mine > value) | ((mine == value) & (token <= last)))
    chosen = chosen & (tl.load(Valid + slot // n * svb + slot % n * svn) != 0)
    tl.store(Chosen + slot, chosen.to(tl.int8))
    if chosen:
        at = Table + image * FIELDS
        columns = tl.load(at + COLUMNS)
        where = token - tl.load(at + START)
        number = where // columns // 4 * ((columns + 3) // 4) + where % columns // 4
        there, place, small, large = block(Table, image, number)
        own = tl.load(Slot + place, mask=there, other=-1) >= 0
        close = tl.load(Slot + small, mask=there, other=-1) >= 0
        inside = there & (tl.where(own, place, tl.where(close, small, large)) == token)
        d = tl.arange(0, BLOCK_D)
        q = tl.load(Asked + slot.to(tl.int64) * D + d, mask=d < D, other=0.0).to(tl.float32)
        mask = inside[:, :, None] & (d < D)[None, None, :]
        row = Told + (place * (2 * D))[:, :, None] + d[None, None, :]
        k = tl.load(row, mask=mask, other=0.0).to(tl.float32)
        score = tl.where(inside, tl.sum(k * q[None, None, :], 2) * scale, -float("inf"))
        weight = tl.exp(score - tl.max(tl.max(score, 1), 0))
        weight = weight / tl.sum(tl.sum(weight, 1), 0)
        v = tl.load(row + D, mask=mask, other=0.0).to(tl.float32)
        seen = tl.sum(tl.sum(weight[:, :, None] * v, 1), 0)
        tl.store(Seen + slot.to(tl.int64) * D + d, seen.to(Seen.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["slots", "n", "shb"])
def _take_up(  # type: ignore[no-untyped-def]
    Hidden, Seen, Chosen, Weight, Gate, Out, slots, n, channels, shb, shn, shc, swc, swd,
    D: tl.constexpr, BLOCK_D: tl.constexpr, M: tl.constexpr, C: tl.constexpr,
) -> None:  # fmt: skip
    """M slots, C channels: the hidden state, and where chosen the gated projection of what was seen."""
    slot = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64)
    c, d = tl.program_id(1) * C + tl.arange(0, C), tl.arange(0, BLOCK_D)
    mask = (slot < slots)[:, None] & (c < channels)[None, :]
    hidden = tl.load(Hidden + (slot // n * shb + slot % n * shn)[:, None] + c[None, :] * shc, mask=mask)
    chosen = tl.load(Chosen + slot, mask=slot < slots, other=0) != 0
    if tl.sum(chosen.to(tl.int32)) > 0:
        at = chosen[:, None] & (d < D)[None, :]
        seen = tl.load(Seen + slot[:, None] * D + d[None, :], mask=at, other=0.0)
        inside = (c < channels)[None, :] & (d < D)[:, None]
        weight = tl.load(Weight + c[None, :] * swc + d[:, None] * swd, mask=inside, other=0.0).to(seen.dtype)
        more = tl.dot(seen, weight, input_precision="tf32x3") * tl.load(Gate).to(tl.float32)
        hidden = tl.where(chosen[:, None], hidden + more.to(hidden.dtype), hidden)
    tl.store(Out + slot[:, None] * channels + c[None, :], hidden, mask=mask)


def dape_inject(
    hidden: Tensor, index: Tensor, valid: Tensor, attention: Tensor, features: Tensor, prompt: Tensor, flat: Tensor,
    lengths: Tensor, grid: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, gate: Tensor, share: float,
) -> Tensor:  # fmt: skip
    """Launcher of ``dape_inject``; features are read once for the densities, once for keys and values (by cuBLAS)."""
    bits = struct.unpack("q", struct.pack("d", share))[0]
    images, blocks = table(lengths, grid, hidden.device, [bits] * len(lengths))
    if not blocks or not hidden.numel():
        return hidden.clone(memory_format=torch.contiguous_format)
    slot, at = locate(index, valid, flat, prompt.shape[1])
    keys = torch.empty(3, len(flat), dtype=torch.int32, device=hidden.device)
    torch.arange(len(flat), out=keys[1])
    keys[2] = 1
    channels, width = features.shape[1], channels_of(features)
    _value[(blocks, len(images))](
        images, slot, attention, features, keys, channels, *features.stride(), attention.stride(0),
        SUM=tl.float64 if features.dtype == torch.float64 else tl.float32, C=width, num_warps=4, maxnreg=255,
    )  # fmt: skip
    found = torch.empty(len(images), 2, dtype=torch.int64, device=hidden.device)
    limit = len(flat).bit_length()
    size = min(4096, max(64, triton.next_power_of_2(blocks * 16)))
    _focus[(len(images),)](images, slot, *keys, found, limit, 2**limit, N=size, num_warps=8)
    asked, told = hidden.flatten(0, 1) @ query.T, features @ torch.cat([key, value]).T
    seen = torch.empty(asked.shape, dtype=hidden.dtype, device=hidden.device)
    chosen = torch.empty(len(asked), dtype=torch.int8, device=hidden.device)
    size, padded = len(query), max(16, triton.next_power_of_2(len(query)))
    _attend[(len(asked),)](
        images, slot, at, valid, keys, found, asked, told, seen, chosen, len(images), index.shape[1],
        1 / math.sqrt(size), *valid.stride(), D=size, BLOCK_D=padded, IMAGES=triton.next_power_of_2(len(images)),
        num_warps=1,
    )  # fmt: skip
    new = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    _take_up[(triton.cdiv(len(asked), 32), triton.cdiv(hidden.shape[2], 64))](
        hidden, seen, chosen, out, torch.tanh(gate), new, len(asked), index.shape[1], hidden.shape[2],
        *hidden.stride(), *out.stride(), D=size, BLOCK_D=padded, M=32, C=64, num_warps=4,
    )  # fmt: skip
    return new
