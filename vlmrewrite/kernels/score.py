"""Scores of vision tokens: the attention that they receive from query tokens, and the largest of each image.

Attention takes two launches: the largest score and the sum of exponentials of each query, the keys split among
programs; then the scores once more, turned into weights and summed over heads, so that no matrix of weights exists.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrewrite.kernels.launch import LOG2E, capped, processors, splits

CAUSAL, BITS, FULL, ADDED = (tl.constexpr(i) for i in range(4))
"""Kinds of masks: none, padding bits [B, K], bool [B, 1, Q, K], additive float [B, 1, Q, K]."""

SPLITS = 32
"""Parts of the keys, at most: what the second launch reads of the first for each query."""


@triton.jit
def _hidden(  # type: ignore[no-untyped-def]
    s, key, inside, query, Mask, smq, smk, before, lowest, MASK: tl.constexpr
):
    """Scores [M, N] under a mask as in :func:`vlmrewrite.ops.attention.visible`; -inf beyond the last key."""
    filled = (key >= 0)[None, :]
    column = tl.maximum(key, 0).to(tl.int64) * smk
    if MASK <= BITS:
        seen = filled & (key[None, :] <= query[:, None])
        if MASK == BITS:
            seen = seen & (tl.load(Mask + column) != 0)[None, :]
        s = tl.where(seen, s, float("-inf"))
    else:
        line = tl.maximum(query - before, 0).to(tl.int64) * smq
        cell = tl.load(Mask + line[:, None] + column[None, :])
        if MASK == FULL:
            s = tl.where(filled & (cell != 0), s, float("-inf"))
        else:
            s = s + tl.where(filled, cell.to(tl.float32), lowest)
    return tl.where(inside[None, :], s, float("-inf"))


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    q, k_tile, d, scale, softcap, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, CAPPED: tl.constexpr
):
    k = tl.load(k_tile) if D == BLOCK_D else tl.load(k_tile, mask=(d < D)[:, None], other=0.0)
    return capped(tl.dot(q, k, input_precision=PRECISION) * scale, softcap, CAPPED)


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    Q, K, Mask, Queries, Keys, Top, Total,
    sqb, sqh, sqt, sqd, skb, skh, skm, skd, smb, smq, smk, spb, spt, scb, scm,
    heads, group, t, m, rows, length, before, scale, softcap, lowest,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    CAPPED: tl.constexpr, MASK: tl.constexpr,
) -> None:  # fmt: skip
    """Top, Total [splits, B, Hk, rows]: largest score, and sum of exponentials of the scores less it."""
    tiles = tl.cdiv(rows, BLOCK_M)
    line = tl.program_id(0) // tiles
    b, kv_head = (line // heads).to(tl.int64), (line % heads).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    live, row = row < rows, tl.minimum(row, rows - 1)
    i = (row % t).to(tl.int64)
    d, near, wide = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N), tl.full([], 0, tl.int64)
    q_tile = Q + b * sqb + ((kv_head * group + row // t) * sqh + i * sqt)[:, None] + (d * sqd)[None, :]
    q = tl.load(q_tile) if D == BLOCK_D else tl.load(q_tile, mask=(d < D)[None, :], other=0.0)
    query = tl.load(Queries + b * spb + i * spt, mask=live, other=-1)
    begin = tl.program_id(1) * length
    end = tl.minimum(begin + length, m)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for at0 in range(begin, end, BLOCK_N):
        at, inside = tl.minimum(at0 + near, end - 1), at0 + near < end
        key = tl.load(Keys + b * scb + (wide + at) * scm)
        k_tile = K + b * skb + kv_head * skh + ((wide + at) * skm)[None, :] + (d * skd)[:, None]
        s = _products(q, k_tile, d, scale, softcap, D, BLOCK_D, PRECISION, CAPPED)
        s = _hidden(s, key, inside, query, Mask + b * smb, smq, smk, before, lowest, MASK)
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp2((top - base) * LOG2E) + tl.sum(tl.exp2((s - base[:, None]) * LOG2E), 1)
        top = new
    out = (tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tiles) + line) * rows + row
    tl.store(Top + out, top, mask=live)
    tl.store(Total + out, total, mask=live)


@triton.jit
def _weights(  # type: ignore[no-untyped-def]
    Q, K, Mask, Queries, Keys, Top, Total, Index, Valid, Out,
    sqb, sqh, sqt, sqd, skb, skh, skm, skd, smb, smq, smk, spb, spt, scb, scm, sib, sin, svb, svn,
    heads, group, t, n, past, rows, parts, every, length, before, scale, softcap, lowest,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, PRECISION: tl.constexpr, CAPPED: tl.constexpr, MASK: tl.constexpr,
) -> None:  # fmt: skip
    """Weights of a block of the last n keys, mean over heads and queries, at their columns of Out [B, length]."""
    blocks, tiles = tl.cdiv(n, BLOCK_N), tl.cdiv(rows, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    near = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = near < n
    at = past + tl.minimum(near, n - 1).to(tl.int64)
    d, part, turn = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_T)
    key = tl.load(Keys + b * scb + at * scm)
    k_tile = K + b * skb + (at * skm)[None, :] + (d * skd)[:, None]
    asked = tl.sum((tl.load(Queries + b * spb + turn * spt, mask=turn < t, other=-1) >= 0).to(tl.int32), 0)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for turns in range(heads * tiles):
        kv_head = turns // tiles
        row = turns % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        live, row = row < rows, tl.minimum(row, rows - 1)
        i = (row % t).to(tl.int64)
        q_tile = ((kv_head * group + row // t).to(tl.int64) * sqh + i * sqt)[:, None] + (d * sqd)[None, :]
        q_tile = Q + b * sqb + q_tile
        q = tl.load(q_tile) if D == BLOCK_D else tl.load(q_tile, mask=(d < D)[None, :], other=0.0)
        query = tl.load(Queries + b * spb + i * spt, mask=live, other=-1)
        sums = ((b * heads + kv_head) * rows + row)[:, None] + part[None, :].to(tl.int64) * every
        there = live[:, None] & (part < parts)[None, :]
        tops = tl.load(Top + sums, mask=there, other=float("-inf"))
        base = tl.max(tops, 1)
        base = tl.where(base == float("-inf"), 0.0, base)
        total = tl.load(Total + sums, mask=there, other=0.0)
        total = tl.sum(total * tl.exp2((tops - base[:, None]) * LOG2E), 1)
        total = tl.where(total == 0.0, 1.0, total)
        s = _products(q, k_tile + (at * 0 + kv_head)[None, :] * skh, d, scale, softcap, D, BLOCK_D, PRECISION, CAPPED)
        s = _hidden(s, key, inside, query, Mask + b * smb, smq, smk, before, lowest, MASK)
        weight = tl.exp2((s - base[:, None]) * LOG2E) / total[:, None]
        acc += tl.sum(tl.where((query >= 0)[:, None], weight, 0.0), 0)
    acc = acc / (heads * group * tl.maximum(asked, 1))
    column = tl.load(Index + b * sib + near * sin, mask=inside, other=0)
    valid = tl.load(Valid + b * svb + near * svn, mask=inside, other=0)
    tl.store(Out + b * length + column, acc, mask=inside & (valid != 0))


def attention_received(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    q_pos: Tensor,
    k_pos: Tensor,
    scale: float | None,
    softcap: float | None,
    index: Tensor,
    valid: Tensor,
    flat: Tensor,
    length: int,
) -> Tensor:
    """See :func:`vlmrewrite.ops.scoring.attention_received`."""
    (batch, q_heads, t, size), (_, heads, m, _), n = q.shape, k.shape, index.shape[1]
    full = torch.zeros(batch, length, dtype=torch.float32, device=q.device)
    if batch == 0 or n == 0 or t == 0:
        return full.view(-1)[flat]
    q_pos, k_pos = q_pos.expand(batch, -1), k_pos.expand(batch, -1)
    kind, strides, before, lowest = CAUSAL.value, (0, 0, 0), 0, 0.0
    if mask is not None:
        mask = mask.expand(batch, *mask.shape[1:])
        kind, strides = BITS.value, (mask.stride(0), 0, mask.stride(-1))
    if mask is not None and mask.dim() == 4:
        kind = FULL.value if mask.dtype == torch.bool else ADDED.value
        strides, before = (mask.stride(0), mask.stride(2), mask.stride(3)), mask.shape[3] - mask.shape[2]
        lowest = 0.0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    group, narrow = q_heads // heads, q.element_size() == 2
    rows, block_d = group * t, max(16, triton.next_power_of_2(size))
    block_m = max(16, min(64 if narrow else 16, triton.next_power_of_2(rows)))
    block_n = max(16, min(128, (16384 if narrow else 8192) // (block_d * q.element_size())))
    lines = batch * heads * -(-rows // block_m)
    parts, part = splits(lines, m, rows, q.device, SPLITS)
    every = batch * heads * rows
    top, total = torch.empty(2, parts, every, dtype=torch.float32, device=q.device)
    tensors = (q, k, q if mask is None else mask, q_pos, k_pos, top, total)
    where = (*q.stride(), *k.stride(), *strides, *q_pos.stride(), *k_pos.stride())
    numbers = (before, size**-0.5 if scale is None else scale, softcap or 0.0, lowest)
    warps = 4 if block_m < 64 and (narrow or block_d <= 64) else 8
    _sums[(lines, parts)](
        *tensors, *where, heads, group, t, m, rows, part, *numbers,
        D=size, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, PRECISION="ieee", CAPPED=softcap is not None,
        MASK=kind, num_warps=warps, num_stages=3,
    )  # fmt: skip
    if batch * n < 64 * processors(q.device):
        block_n = 16
    _weights[(batch * -(-n // block_n),)](
        *tensors, index, valid, full, *where, *index.stride(), *valid.stride(),
        heads, group, t, n, m - n, rows, parts, every, length, *numbers,
        D=size, BLOCK_D=block_d, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_T=triton.next_power_of_2(t),
        BLOCK_S=triton.next_power_of_2(parts), PRECISION="ieee", CAPPED=softcap is not None,
        MASK=kind, num_warps=warps, num_stages=3,
    )  # fmt: skip
    return full.view(-1)[flat]


@triton.jit
def _ranks(weights, members, at, n, sw, sm):  # type: ignore[no-untyped-def]
    """Unsigned integers in the order of the weights, NaN above all, -0 as 0; 0 for those that are not members."""
    w = tl.load(weights + at * sw, mask=at < n, other=0.0).to(tl.float32)
    bits = tl.where(w == 0.0, 0.0, w).to(tl.int32, bitcast=True)
    bits = tl.where(w != w, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    member = tl.load(members + at * sm, mask=at < n, other=0) != 0
    return tl.where(member, bits.to(tl.uint32, bitcast=True) ^ 0x80000000, 0).to(tl.uint32)


@triton.jit
def _top(Weights, Member, Images, Out, images, sw, sm, BLOCK: tl.constexpr) -> None:  # type: ignore[no-untyped-def]
    """One program an image; Images [3, I]: first token, number of tokens, how many to choose."""
    image = tl.program_id(0)
    first = tl.load(Images + image)
    n = tl.load(Images + images + image).to(tl.int32)
    keep = tl.load(Images + 2 * images + image).to(tl.int32)
    near = tl.arange(0, BLOCK)
    weights, members = Weights + first * sw, Member + first * sm
    count = tl.full([], 0, tl.int32)
    for at in range(0, n, BLOCK):
        count += tl.sum((_ranks(weights, members, at + near, n, sw, sm) > 0).to(tl.int32), 0)
    keep = tl.minimum(keep, count)

    least = tl.full([], 0, tl.uint32)  # the largest rank that at least `keep` tokens reach, bit by bit
    for bit in range(32):
        tried = least | (tl.full([], 1, tl.uint32) << (31 - bit))
        count = tl.full([], 0, tl.int32)
        for at in range(0, n, BLOCK):
            count += tl.sum((_ranks(weights, members, at + near, n, sw, sm) >= tried).to(tl.int32), 0)
        least = tl.where(count >= keep, tried, least)

    above = tl.full([], 0, tl.int32)
    for at in range(0, n, BLOCK):
        above += tl.sum((_ranks(weights, members, at + near, n, sw, sm) > least).to(tl.int32), 0)
    left = keep - above  # for the tokens of rank `least`, the first of them
    for at in range(0, n, BLOCK):
        rank = _ranks(weights, members, at + near, n, sw, sm)
        equal = (rank == least).to(tl.int32)
        chosen = (rank > least) | ((equal != 0) & (tl.cumsum(equal, 0) <= left))
        tl.store(Out + first + at + near, chosen, mask=at + near < n)
        left -= tl.sum(equal, 0)


def top_attention(weights: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """See :func:`vlmrewrite.ops.scoring.top_attention`.

    Raises:
        TypeError: the weights are fp64.
    """
    if weights.dtype == torch.float64:
        raise TypeError("the kernel of top_attention ranks fp16, bf16 and fp32; got weights in torch.float64")
    chosen = torch.empty(member.shape, dtype=torch.bool, device=member.device)
    if chosen.numel() == 0:
        return chosen
    images = torch.stack([lengths.cumsum(0) - lengths, lengths, keep]).to(weights.device, non_blocking=True)
    block = max(1024, min(4096, triton.next_power_of_2(int(lengths.max()))))
    _top[(len(lengths),)](
        weights, member, images, chosen, len(lengths), weights.stride(0), member.stride(0),
        BLOCK=block, num_warps=max(4, block // 512),
    )  # fmt: skip
    return chosen
