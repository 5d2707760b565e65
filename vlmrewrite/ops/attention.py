"""Attention by logical position, and the cache's append: what one decoder layer computes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmrewrite.ops.library import REFERENCES, define


def visible(mask: Tensor | None, q_pos: Tensor | None, k_pos: Tensor | None, plain: bool) -> Tensor | None:
    """Which key each query sees, by logical position.

    A key is visible if its position is not after the query's and its padding bit is set; with a 4-D mask, the mask
    alone decides. A negative key position is an empty slot and never visible.

    Args:
        mask: None, padding bits [B, K] (bool, K logical key positions), or a full mask [B, 1, Q, K] (bool, or additive
            float) whose last query is the last key position.
        q_pos: logical positions of the queries, int64 [B, n].
        k_pos: logical positions of the keys, int64 [B, m].
        plain: queries and keys are the same tokens in order and no mask applies: plain causal attention.

    Returns:
        None if ``plain``, else bool (or additive float) [B, 1, n, m].
    """
    if plain:
        return None
    assert q_pos is not None and k_pos is not None
    filled = (k_pos >= 0)[:, None, None, :]
    if mask is None:
        return (k_pos[:, None, None, :] <= q_pos[:, None, :, None]) & filled
    at = k_pos.clamp(min=0)
    if mask.dim() == 2:
        bits = mask.expand(k_pos.shape[0], -1).gather(1, at)[:, None, None, :]
        return (k_pos[:, None, None, :] <= q_pos[:, None, :, None]) & bits & filled
    rows = (q_pos - (mask.shape[-1] - mask.shape[-2])).clamp(min=0)
    batch = torch.arange(k_pos.shape[0], device=k_pos.device)[:, None, None]
    full = mask.expand(k_pos.shape[0], -1, -1, -1)[:, 0]
    out = full[batch, rows[:, :, None], at[:, None, :]][:, None]
    return out & filled if out.dtype == torch.bool else out.masked_fill(~filled, torch.finfo(out.dtype).min)


def attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None, softcap: float | None, dropout: float
) -> Tensor:
    """Attention under a mask made by :func:`visible`; without one, causal with the last query at the last key.

    Args:
        q: [B, H, n, D]. k: [B, Hk, m, D]. v: [B, Hk, m, Dv].
        seen: what :func:`visible` returned.

    Returns:
        [B, n, H, Dv], contiguous, dtype of ``q``.
    """
    if softcap is not None:
        return _attend_softcapped(q, k, v, seen, scale, softcap, dropout)
    (rows, heads, n, _), (others, m), causal = q.shape, k.shape[1:3], False
    if seen is None and n > 1:  # a branch, since a symbolic comparison is no bool that the kernel below would take
        if n == m:
            causal = True
        else:
            seen = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)[None, None]
    grouped: dict[str, bool] = {"enable_gqa": True} if heads != others else {}  # no comparison: it may be symbolic
    if grouped and n == 1:
        out = F.scaled_dot_product_attention(_in_groups(q, k), k, v, attn_mask=seen, dropout_p=dropout, scale=scale)
        return out.reshape(rows, 1, heads, v.shape[3])
    if grouped and seen is not None and q.device.type != "cpu":  # no fast kernel elsewhere takes both
        (k, v), grouped = (x.repeat_interleave(heads // others, 1) for x in (k, v)), {}
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=causal, scale=scale, **grouped
    )
    return out.transpose(1, 2).contiguous()


def _in_groups(q: Tensor, k: Tensor) -> Tensor:
    """Queries [B, H, n, D], those of one head of the keys [B, Hk, m, D] below one another: [B, Hk, H / Hk * n, D]."""
    (rows, heads, n, size), others = q.shape, k.shape[1]
    return q.reshape(rows, others, heads // others * n, size)


def products(q: Tensor, k: Tensor) -> Tensor:
    """Of each query [B, H, n, D] with the keys [B, Hk, m, D] of its head: [B, H, n, m]."""
    pairs = _in_groups(q, k) @ k.transpose(2, 3)
    return pairs.reshape(*q.shape[:3], k.shape[2])


def _attend_softcapped(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None, softcap: float, dropout: float
) -> Tensor:
    scores = products(q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if seen is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    bias = seen if seen.dtype != torch.bool else torch.zeros_like(scores).masked_fill(~seen, float("-inf"))
    weights = F.dropout((scores + bias).softmax(-1, dtype=torch.float32).nan_to_num(0.0).to(q.dtype), dropout)
    out = (_in_groups(weights, v) @ v).reshape(*q.shape[:3], v.shape[3])
    return out.transpose(1, 2).contiguous()


def everywhere(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of q [B, H, n, D] and k [B, Hk, m, D] where nothing says otherwise: the last n of 0 .. m-1, and all."""
    at = torch.arange(k.shape[2], device=k.device)[None].expand(k.shape[0], -1)
    return at[:, k.shape[2] - q.shape[2] :], at


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
    scale: float | None = None,
    plain: bool = True,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """One decoder layer's attention, with causality by logical position. See :func:`visible` and :func:`attend`.

    Returns:
        [B, n, H, Dv], contiguous.
    """
    if not plain and (q_pos is None or k_pos is None):
        last, every = everywhere(q, k)
        q_pos = last if q_pos is None else q_pos
        k_pos = every if k_pos is None else k_pos
    return attend(q, k, v, visible(mask, q_pos, k_pos, plain), scale, softcap, dropout)


FREE = -2
"""Position of a slot that nothing was written to yet; no other one, of any row, is before it."""


def free_slots(positions: Tensor, pos: Tensor) -> Tensor:
    """The first slots that are free for tokens of positions ``pos`` int64 [B, t], among int64 [B, m]: int64 [t]."""
    return (positions[0] != FREE).sum() + torch.arange(pos.shape[1], device=pos.device)


def kv_append(
    keys: Tensor | None,
    values: Tensor | None,
    positions: Tensor | None,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    fixed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grow one layer's cache: keys [B, Hk, m, D], values [B, Hk, m, Dv] and logical positions int64 [B, m] together.

    The first three are None for an empty cache; a position of -1 marks an empty slot. A ``fixed`` cache stays as long
    as it is: tokens take the first slots that are free.
    """
    if keys is None or values is None or positions is None:
        return k, v, pos
    if fixed:
        at = free_slots(positions, pos)
        new = k.to(keys.dtype), v.to(values.dtype)
        return keys.index_copy(2, at, new[0]), values.index_copy(2, at, new[1]), positions.index_copy(1, at, pos)
    return torch.cat([keys, k], 2), torch.cat([values, v], 2), torch.cat([positions, pos], 1)


def attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    """The output of any attention of q [B, H, n, D], k and v [B, Hk, m, Dv]: [B, n, H, Dv]."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


def _kv_append_op(keys: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    k, v, pos = kv_append(keys, *rest)
    return (k, v, pos) if keys is not None else (k.clone(), v.clone(), pos.clone())  # an output must not be an input


def _kv_append_fake(
    keys: Tensor | None,
    values: Tensor | None,
    positions: Tensor | None,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    fixed: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    if fixed and keys is not None and values is not None and positions is not None:
        return torch.empty_like(keys), torch.empty_like(values), torch.empty_like(positions)
    n = (0 if keys is None else keys.shape[2]) + k.shape[2]
    return (
        k.new_empty(k.shape[0], k.shape[1], n, k.shape[3]),
        v.new_empty(v.shape[0], v.shape[1], n, v.shape[3]),
        pos.new_empty(pos.shape[0], n),
    )


def attention_flops(
    q_shape: list[int], k_shape: list[int], v_shape: list[int], *_: object, out_shape: object = None, **__: object
) -> int:
    """FLOPs of any attention whose first arguments are q, k and v: two products over all pairs."""
    b, h, n, d = q_shape
    return 2 * b * h * n * k_shape[2] * (d + v_shape[-1])


define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? mask=None, Tensor? q_pos=None, Tensor? k_pos=None,"
    " float? scale=None, bool plain=True, float? softcap=None, float dropout=0.0) -> Tensor",
    attention,
    attention_fake,
    flops=attention_flops,
)

define(
    "kv_append(Tensor? keys, Tensor? values, Tensor? positions, Tensor k, Tensor v, Tensor pos,"
    " bool fixed=False) -> (Tensor, Tensor, Tensor)",
    _kv_append_op,
    _kv_append_fake,
)

ATTENTION, KV_APPEND = torch.ops.vlm.attention.default, torch.ops.vlm.kv_append.default

REFERENCES[KV_APPEND] = kv_append
