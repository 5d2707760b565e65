"""Decoding: attention of a few queries against a long cache, the keys split among programs (flash decoding).

One launch attends within each split, with the query heads that share a key head as the rows of one matrix product, so
that each key is read once; a second one joins the splits. Time is that of reading the keys and values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrewrite import moved
from vlmrewrite.kernels.launch import LOG2E, capped, splits


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    Q, K, V, Queries, Keys, Out, Sums,
    sqb, sqh, sqn, sqd, skb, skh, skm, skd, svb, svh, svm, svd, spb, spn, scb, scm,
    heads, group, n, m, rows, length, scale, softcap, window,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, TRIM: tl.constexpr, JOINED: tl.constexpr,
) -> None:  # fmt: skip
    """One split for the rows that share a key head: Out [splits, B, n, H, Dv] and log2 of the weights' sums."""
    tiles = tl.cdiv(rows, BLOCK_M)
    tile = tl.program_id(0) % tiles
    b = (tl.program_id(0) // tiles // heads).to(tl.int64)
    kv_head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    split = tl.program_id(1)
    wide = tl.full([], 0, tl.int64)

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < rows
    head, i = kv_head * group + row // n, (row % n).to(tl.int64)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    query = tl.load(Queries + b * spb + i * spn, mask=live, other=-1)
    q_tile = Q + b * sqb + (head * sqh + i * sqn)[:, None] + (d * sqd)[None, :]
    q = tl.load(q_tile, mask=live[:, None] & (d < D)[None, :], other=0.0)

    begin = split * length
    end = tl.minimum(begin + length, m)
    if TRIM:  # keys before the first and after the last one that any row sees are not read
        newest = tl.max(query, 0)
        oldest = tl.min(tl.where(live, query, 2147483647), 0) - window
        first, last = end, begin
        for at0 in range(begin, end, 512):
            at = at0 + tl.arange(0, 512)
            key = tl.load(Keys + b * scb + (wide + at0) * scm + tl.arange(0, 512) * scm, mask=at < end, other=-1)
            seen = (key >= 0) & (key <= newest)
            if WINDOWED:
                seen = seen & (key > oldest)
            first = tl.minimum(first, tl.min(tl.where(seen, at, end), 0))
            last = tl.maximum(last, tl.max(tl.where(seen, at + 1, begin), 0))
        begin, end = first, last

    near = tl.arange(0, BLOCK_N)
    k_base = K + b * skb + kv_head * skh
    v_base = V + b * svb + kv_head * svh
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for at0 in range(begin, end, BLOCK_N):
        at = tl.minimum(at0 + near, end - 1)
        key = tl.load(Keys + b * scb + (wide + at) * scm)
        key = tl.where(at0 + near < end, key, -1)
        k_tile = k_base + ((wide + at) * skm)[None, :] + (d * skd)[:, None]
        k = tl.load(k_tile) if D == BLOCK_D else tl.load(k_tile, mask=(d < D)[:, None], other=0.0)
        s = capped(tl.dot(q, k, input_precision=PRECISION) * scale, softcap, CAPPED)
        seen = (key >= 0)[None, :] & (key[None, :] <= query[:, None])
        if WINDOWED:
            seen = seen & (key[None, :] > query[:, None] - window)
        s = tl.where(seen, s * LOG2E, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        p = tl.exp2(s - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        v_tile = v_base + ((wide + at) * svm)[:, None] + (dv * svd)[None, :]
        v = tl.load(v_tile) if DV == BLOCK_DV else tl.load(v_tile, mask=(dv < DV)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new

    some = tl.where(total == 0.0, 1.0, total)
    every = tl.num_programs(0).to(tl.int64) // tiles * rows  # B n H
    out = split * every + (b * n + i) * (heads * group) + head
    stored = (acc / some[:, None]).to(Out.dtype.element_ty)
    tl.store(Out + (out * DV)[:, None] + dv[None, :], stored, mask=live[:, None] & (dv < DV)[None, :])
    if not JOINED:
        tl.store(Sums + out, top + tl.log2(some), mask=live)


@triton.jit
def _join(  # type: ignore[no-untyped-def]
    Parts, Sums, Out, parts, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr
) -> None:
    """Parts [splits, B n H, Dv] weighted by their sums of weights; one program a row."""
    row, every = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    dv, s = tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_S)
    logs = tl.load(Sums + s * every + row, mask=s < parts, other=float("-inf"))
    top = tl.max(logs, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(logs - top), 0)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for s0 in range(0, parts, CHUNK):
        at = s0 + tl.arange(0, CHUNK)
        weight = tl.exp2(tl.load(Sums + at * every + row, mask=at < parts, other=float("-inf")) - top)
        mask = (at < parts)[:, None] & (dv < DV)[None, :]
        part = tl.load(Parts + ((at * every + row) * DV)[:, None] + dv[None, :], mask=mask, other=0.0)
        acc += tl.sum(part * weight[:, None], 0)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(Out + row * DV + dv, acc.to(Out.dtype.element_ty), mask=dv < DV)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """See :func:`vlmrewrite.ops.positional.decode_attention`."""
    (batch, q_heads, n, size), (_, heads, m, _), size_v = q.shape, k.shape, v.shape[-1]
    out = torch.empty(batch, n, q_heads, size_v, dtype=q.dtype, device=q.device)
    if out.numel() == 0 or m == 0:
        return out.zero_()
    rows, every = q_heads // heads * n, batch * n * q_heads
    block_d, block_dv = (max(16, triton.next_power_of_2(x)) for x in (size, size_v))
    narrow = q.element_size() == 2
    block_m = max(16, min(64 if narrow else 16, triton.next_power_of_2(rows)))
    row_bytes = max(block_d, block_dv) * q.element_size()
    block_n = max(16, min(128 if block_m < 64 else 64, (16384 if narrow else 8192) // row_bytes))
    programs = batch * heads * -(-rows // block_m)
    parts, length = splits(programs, m, rows, q.device)
    if parts == 1:
        halves = sums = out
    else:
        halves = torch.empty(parts, every, size_v, dtype=torch.float32, device=q.device)
        sums = torch.empty(parts, every, dtype=torch.float32, device=q.device)
    _attend[(programs, parts)](
        q, k, v, queries, keys, halves, sums,
        *q.stride(), *k.stride(), *v.stride(), *queries.stride(), *keys.stride(),
        heads, q_heads // heads, n, m, rows, length,
        size**-0.5 if scale is None else scale, softcap or 0.0, window or 0,
        D=size, DV=size_v, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=block_m, BLOCK_N=block_n, PRECISION="ieee",
        CAPPED=softcap is not None, WINDOWED=window is not None, TRIM=window is not None or batch > 1,
        JOINED=parts == 1, num_warps=4 if block_m < 64 and (narrow or block_d > 128) else 8, num_stages=3,
    )  # fmt: skip
    if parts > 1:
        _join[(every,)](
            halves, sums, out, parts,
            DV=size_v, BLOCK_DV=block_dv, BLOCK_S=triton.next_power_of_2(parts), CHUNK=16, num_warps=4,
        )  # fmt: skip
    return out


moved.register(__name__)
