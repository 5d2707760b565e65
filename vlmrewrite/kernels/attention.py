"""Attention of a token set with causality by logical position: FlashAttention-2 over the key ranges that are visible.

Source: Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrewrite.compat import gpu_architecture
from vlmrewrite.ops import interpreted

_LOG2E = math.log2(math.e)

# (BLOCK_M, BLOCK_N, warps, stages) that keep everything in registers, by whether the GPU has wgmma, whether the numbers
# are fp32, and the largest head size
_SHAPES = {
    (True, False, 64): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
    (True, False, 128): [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3)],
    (True, False, 256): [(128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 2)],
    (True, True, 64): [(128, 32, 8, 2), (64, 32, 4, 2)],
    (True, True, 96): [(16, 32, 4, 2)],
    (True, True, 128): [(32, 32, 8, 2), (16, 32, 4, 2)],
    (True, True, 256): [(16, 16, 8, 2), (16, 16, 4, 2)],
    (False, False, 64): [(128, 64, 8, 3), (64, 64, 4, 3)],
    (False, False, 128): [(128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 4, 3)],
    (False, False, 256): [(64, 64, 8, 2), (64, 32, 8, 2)],
    (False, True, 64): [(32, 32, 4, 2)],
    (False, True, 96): [(16, 32, 4, 2)],
    (False, True, 128): [(32, 32, 8, 2), (16, 32, 4, 2)],
    (False, True, 256): [(16, 16, 8, 2), (16, 16, 4, 2)],
}

# its addresses take half of the registers; at most 64 queries, as those without a visible key go by their own block
_UNDER_FULL_MASK = {False: [(64, 32, 8, 2)], True: [(16, 16, 8, 2)]}

_CONFIGS = {
    (m, n, w, s): triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s)
    for m, n, w, s in dict.fromkeys(x for shapes in (*_SHAPES.values(), *_UNDER_FULL_MASK.values()) for x in shapes)
}


def _fitting(configs: list[triton.Config], named: dict[str, Any], **meta: Any) -> list[triton.Config]:
    fp32 = named["q"].dtype == torch.float32
    if named["full"] is not None:
        return [_CONFIGS[x] for x in _UNDER_FULL_MASK[fp32]]
    wgmma = interpreted() or gpu_architecture() >= 90
    size = max(meta["D"], meta["DV"])
    shapes = next(x for (w, f, most), x in _SHAPES.items() if (w, f) == (wgmma, fp32) and size <= most)
    return [_CONFIGS[x] for x in shapes if x[0] <= max(named["bucket"], 64)]


@triton.jit
def _columns(at, column, size, EXACT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load a tile of which the columns from ``size`` on do not exist."""
    return tl.load(at) if EXACT else tl.load(at, mask=(column < size)[None, :], other=0.0)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    acc, acc_rest, total, peak, q, q_rest, q_pos, k, v, keys, full, start, stop, later, end, scale, cap,
    window, hidden, stride_km, stride_kd, stride_vm, stride_vd, stride_fk,
    MASKED: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
    V1: tl.constexpr, V2: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys [start, stop) and [later, end), in one loop without a branch: it is pipelined."""
    n = tl.arange(0, BLOCK_N)
    d, e = tl.arange(0, D1), tl.arange(0, V1)
    early = tl.cdiv(stop - start, BLOCK_N)
    for i in range(early + tl.cdiv(end - later, BLOCK_N)):
        at = start + i * BLOCK_N
        if MASKED:
            at = tl.where(i < early, at, later + (i - early) * BLOCK_N)
        # rows that are not there are others, hidden below: that takes fewer registers than a mask for each load
        row = (tl.minimum(at + n, end - 1) if MASKED else at + n).to(tl.int64)[:, None]
        tile = _columns(k + row * stride_km + d[None, :] * stride_kd, d, D, D1 <= D)
        s = tl.dot(q, tl.trans(tile), input_precision=PRECISION)
        if D2:
            d2 = D1 + tl.arange(0, D2)
            tile = _columns(k + row * stride_km + d2[None, :] * stride_kd, d2, D, D1 + D2 <= D)
            s = tl.dot(q_rest, tl.trans(tile), s, input_precision=PRECISION)
        unit = scale
        if cap is not None:
            s = cap - 2.0 * cap / (1.0 + tl.exp2(s * scale))  # cap * tanh, of which `scale` is the argument's
            unit = 1.0
        if MASKED:
            # not `at + n < ...`, which takes 15 to 65 registers more
            k_pos = tl.load(keys + at + n, mask=n < tl.where(i < early, stop, end) - at, other=-1)
            if full is None:
                seen = tl.where(k_pos < 0, 2147483647, k_pos)[None, :] <= q_pos[:, None]
                if window is not None:
                    seen = seen & (k_pos[None, :] > (q_pos - window)[:, None])
            else:
                seen = (k_pos >= 0)[None, :]
                cell = tl.load(full[:, None] + k_pos[None, :] * stride_fk, mask=seen, other=0)
                if hidden is None:
                    seen = seen & (cell != 0)
                else:
                    bias = cell.to(tl.float32)
                    seen = seen & (bias > hidden)
                    s = s * unit + bias * 1.4426950408889634
                    unit = 1.0
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(peak, tl.max(s, 1) * unit)
        p = tl.exp2(s * unit - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, 1)
        peak = higher
        tile = _columns(v + row * stride_vm + e[None, :] * stride_vd, e, DV, V1 <= DV)
        p = p.to(tile.dtype)
        acc = tl.dot(p, tile, acc * shrink[:, None], input_precision=PRECISION)
        if V2:
            e2 = V1 + tl.arange(0, V2)
            tile = _columns(v + row * stride_vm + e2[None, :] * stride_vd, e2, DV, V1 + V2 <= DV)
            acc_rest = tl.dot(p, tile, acc_rest * shrink[:, None], input_precision=PRECISION)
    return acc, acc_rest, total, peak


@triton.autotune(
    list(_CONFIGS.values()),
    key=["bucket", "D", "DV"],
    cache_results=True,
    prune_configs_by={"early_config_prune": _fitting},
)
@triton.jit(do_not_specialize=["n", "n_blocks", "bucket", "shift", "stride_keys"])
def attention_forward_kernel(  # type: ignore[no-untyped-def]
    q, k, v, queries, keys, blocks, full, out, n, n_blocks, bucket, heads, group, scale, cap, window, hidden, shift,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_km, stride_kd,
    stride_vb, stride_vh, stride_vm, stride_vd, stride_keys, stride_fb, stride_fq, stride_fk,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program for BLOCK_M queries of a head: first the keys that all of them see, then those that need a mask."""
    pid = tl.program_id(0)
    h = pid % heads
    tiles = tl.cdiv(n, BLOCK_M)
    tile = tiles - 1 - pid // heads % tiles  # causal queries see the more keys the later they are: longest first
    b = (pid // heads // tiles).to(tl.int64)

    # the ranges of this tile's blocks of 64 queries: together and, for the keys without a mask, in common
    first, end, full_first, full_end = 2147483647, 0, 0, 2147483647
    for i in tl.static_range((BLOCK_M + 63) // 64):
        j = tile * BLOCK_M // 64 + i
        at = blocks + (b * n_blocks + j) * 4
        there = j < n_blocks
        f, e = tl.load(at, mask=there, other=0), tl.load(at + 1, mask=there, other=0)
        g, i_end = tl.load(at + 2, mask=there, other=0), tl.load(at + 3, mask=there, other=0)
        some = e > f
        first = tl.where(some, tl.minimum(first, f), first)
        end = tl.where(some, tl.maximum(end, e), end)
        full_first = tl.where(some, tl.maximum(full_first, g), full_first)
        full_end = tl.where(some, tl.minimum(full_end, i_end), full_end)
    first = tl.minimum(first, end)
    full_end = tl.minimum(full_end, end)
    count = tl.maximum(full_end - full_first, 0) // BLOCK_N * BLOCK_N
    if hidden is not None:  # what is added to the scores is read for all keys
        count = 0
    full_first = tl.where(count > 0, full_first, first)
    full_end = full_first + count

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < n
    q_pos = tl.load(queries + b * n + row, mask=inside, other=-1)
    q += b * stride_qb + tl.cast(h, tl.int64) * stride_qh
    k += b * stride_kb + tl.cast(h // group, tl.int64) * stride_kh
    v += b * stride_vb + tl.cast(h // group, tl.int64) * stride_vh
    keys += b * stride_keys
    d, e = tl.arange(0, D1), tl.arange(0, V1)
    q_at = q + row.to(tl.int64)[:, None] * stride_qn
    x = tl.load(q_at + d[None, :] * stride_qd, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    x_rest = x
    if D2:
        d2 = D1 + tl.arange(0, D2)
        x_rest = tl.load(q_at + d2[None, :] * stride_qd, mask=inside[:, None] & (d2 < D)[None, :], other=0.0)

    acc = tl.zeros([BLOCK_M, V1], tl.float32)
    acc_rest = acc
    if V2:
        acc_rest = tl.zeros([BLOCK_M, V2], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -3e38, tl.float32)  # finite, so that a tile without a visible key changes nothing
    line = full
    if full is not None:
        line = full + b * stride_fb + tl.maximum(q_pos - shift, 0).to(tl.int64) * stride_fq
    if hidden is None:
        acc, acc_rest, total, peak = _attend(
            acc, acc_rest, total, peak, x, x_rest, q_pos, k, v, keys, None, full_first, full_end, full_end, full_end,
            scale, cap, window, hidden, stride_km, stride_kd, stride_vm, stride_vd, stride_fk,
            False, D, DV, D1, D2, V1, V2, BLOCK_N, PRECISION,
        )  # fmt: skip
    acc, acc_rest, total, peak = _attend(
        acc, acc_rest, total, peak, x, x_rest, q_pos, k, v, keys, line, first, full_first, full_end, end,
        scale, cap, window, hidden, stride_km, stride_kd, stride_vm, stride_vd, stride_fk,
        True, D, DV, D1, D2, V1, V2, BLOCK_N, PRECISION,
    )  # fmt: skip
    blind = (total == 0.0) | (q_pos < 0)
    total = tl.where(blind, 1.0, total)
    out += ((b * n + row) * heads + h)[:, None] * DV
    acc = tl.where(blind[:, None], 0.0, acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + e[None, :], acc, mask=inside[:, None] & (e < DV)[None, :])
    if V2:
        e2 = V1 + tl.arange(0, V2)
        acc = tl.where(blind[:, None], 0.0, acc_rest / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + e2[None, :], acc, mask=inside[:, None] & (e2 < DV)[None, :])


def _pieces(d: int, fp32: bool) -> tuple[int, int]:
    """Powers of two that hold a head size: two beyond 128, which saves registers; below, two if that is less work."""
    half = 128 if d > 128 else max(16, triton.next_power_of_2(d)) // 2
    rest = max(16, triton.next_power_of_2(d - half))
    return (half, rest) if d > 128 or (rest < half and not fp32) else (2 * half, 0)


def positional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor,
    keys: Tensor,
    blocks: Tensor,
    full: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Launch the kernel; takes and returns what :func:`vlmrewrite.ops.positional.positional_attention` does."""
    batch, heads, n, d = q.shape
    dv = v.shape[-1]
    out = q.new_empty(batch, n, heads, dv)
    if out.numel() == 0:
        return out
    scale = d**-0.5 if scale is None else scale
    if scale <= 0.0:  # the kernel takes a row's largest score before it scales
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)
    hidden: float | None = None
    shift, strides = 0, (0, 0, 0)
    if full is not None:
        shift = full.shape[-1] - full.shape[-2]
        strides = (full.stride(0) if full.shape[0] > 1 else 0, full.stride(2), full.stride(3))
        if full.dtype == torch.bool:
            full = full.view(torch.uint8)
        else:
            hidden = torch.finfo(full.dtype).min / 2
    scale, cap = (scale * _LOG2E, None) if softcap is None else (2 * scale / softcap * _LOG2E, softcap * _LOG2E)
    fp32 = q.dtype == torch.float32
    (d1, d2), (v1, v2) = _pieces(d, fp32), _pieces(dv, fp32)

    def grid(meta: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(n, meta["BLOCK_M"]) * heads * batch,)

    queries, keys, blocks = queries.contiguous(), keys.contiguous(), blocks.contiguous()
    attention_forward_kernel[grid](
        q, k, v, queries, keys, blocks, full, out, n, blocks.shape[1], triton.next_power_of_2(n), heads,
        heads // k.shape[1], scale, cap, window, hidden, shift, *q.stride(), *k.stride(), *v.stride(), keys.stride(0),
        *strides, D=d, DV=dv, D1=d1, D2=d2, V1=v1, V2=v2, PRECISION="tf32x3" if fp32 else "ieee",
    )  # fmt: skip
    return out
