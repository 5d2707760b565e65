"""Attention by logical position as kernels take it: prefill, decode, and what a layer's queries see."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmrewrite.ops.attention import attend, attention_fake, attention_flops, everywhere, visible
from vlmrewrite.ops.choice import DECODE
from vlmrewrite.ops.library import KERNELS, define

BLOCK = 64
"""Queries, and keys, that a range is worked out for."""

_FAR = 2**31 - 1


def unhidden(mask: Tensor | None, k_pos: Tensor) -> Tensor:
    """Logical positions of keys, int32 [B, m]; -1 where the slot is empty or padded, so that no query sees the key.

    Args:
        mask: None, padding bits [B or 1, K] (bool or integer, K logical key positions), or a full mask, which hides
            nothing here.
        k_pos: logical positions [B, m], int; negative for empty slots.
    """
    shown = k_pos >= 0
    if mask is not None and mask.dim() == 2:
        shown = shown & (mask.expand(k_pos.shape[0], -1).gather(1, k_pos.clamp(min=0).long()) != 0)
    return torch.where(shown, k_pos, -1).to(torch.int32)


def _by_mask(full: Tensor, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """A full mask at queries [B, n] and keys [B, m], and which key each query sees by it: [B, 1, n, m] both."""
    out = visible(full, queries.long(), keys.long(), False)
    assert out is not None
    return out, out if out.dtype == torch.bool else out > torch.finfo(out.dtype).min / 2


def attention_blocks(
    mask: Tensor | None, q_pos: Tensor, k_pos: Tensor, window: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What :func:`positional_attention` needs to know of its queries and keys; the same for all layers of these sets.

    Right for positions in any order; the ranges are tight where they ascend, and by a full mask always.

    Args:
        mask: as for :func:`unhidden`.
        q_pos: logical positions of the queries, int [B, n]; -1 where there is no query.
        k_pos: logical positions of the keys, int [B, m]; -1 where there is no key.
        window: number of positions that a query sees, itself included; ignored with a full mask.

    Returns:
        queries int32 [B, n]; keys int32 [B, m], see :func:`unhidden`; blocks int32 [B, ceil(n / 64), 4]: for each 64
        queries, the range ``[first, end)`` that holds every key which one of them sees, and in it the longest range
        ``[full_first, full_end)`` of whole blocks of 64 keys which all of them see (under an additive mask: to which
        it may add something).
    """
    queries, keys = q_pos.clamp(min=-1).to(torch.int32), unhidden(mask, k_pos)
    n, m = queries.shape[1], keys.shape[1]
    # a block of empty slots more than needed, so that none is an empty tensor
    at = F.pad(queries, (0, -n % BLOCK), value=-1).unflatten(1, (-1, BLOCK))
    of = F.pad(keys, (0, -m % BLOCK + BLOCK), value=-1).unflatten(1, (-1, BLOCK))
    q_least = torch.where(at >= 0, at, _FAR).amin(2)[:, :, None]
    q_most = at.amax(2)[:, :, None]
    k_least = torch.where(of >= 0, of, _FAR).amin(2)[:, None]
    k_most = of.amax(2)[:, None]
    if mask is not None and mask.dim() == 4:
        there = (at >= 0)[:, :, :, None, None]
        cells = _by_mask(mask, at.flatten(1), of.flatten(1))[1][:, 0]
        cells = cells.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))
        needed = (cells & there).any(4).any(2)
        common = (cells | ~there).all(4).all(2) & (q_most >= 0)
    else:
        needed = k_least <= q_most
        common = (of >= 0).all(2)[:, None] & (k_most <= q_least) & (q_most >= 0)
        if window is not None:
            needed = needed & (k_most > q_least - window)
            common = common & (k_least > q_most - window)
    block = torch.arange(of.shape[1], dtype=torch.int32, device=keys.device)
    end = torch.where(needed, block + 1, 0).amax(2)
    first = torch.minimum(torch.where(needed, block, _FAR).amin(2), end)
    run = block - torch.where(common, -1, block).cummax(2).values
    length, last = run.max(2)
    full_end = torch.where(length > 0, last.to(torch.int32) + 1, first)
    full_first = torch.where(length > 0, full_end - length, first)
    blocks = torch.stack([first, end, full_first, full_end], 2) * BLOCK
    return queries, keys, blocks.clamp(max=m).to(torch.int32)


def seen_by_position(queries: Tensor, keys: Tensor, window: int | None = None) -> Tensor:
    """Whether each query [B, n] sees each key [B, m], by logical positions and a window: bool [B, 1, n, m]."""
    seen = (keys[:, None, None, :] <= queries[:, None, :, None]) & (keys >= 0)[:, None, None, :]
    return seen if window is None else seen & (keys[:, None, None, :] > queries[:, None, :, None] - window)


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
    """Attention with visibility by logical position. The gradient is that of SDPA with the mask written out.

    Keys and values must be finite, invisible ones too. fp32 is computed in fp32 or, by the kernel, in three TF32
    products for each.

    Args:
        q: [B, H, n, D], fp16, bf16 or fp32; any strides. k: [B, Hk, m, D]. v: [B, Hk, m, Dv].
        queries, keys, blocks: what :func:`attention_blocks` returned for the same mask and window.
        full: a mask in logical positions [B or 1, 1, Q, K], bool or additive float, whose last query is the last key
            position; it decides alone. An entry below half the least number of its dtype hides the key.
        scale: of the scores; by default D ** -0.5.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        window: number of positions that a query sees, itself included; ignored with a full mask.

    Returns:
        [B, n, H, Dv], contiguous, dtype of ``q``; 0 for queries that see no key.
    """
    there = (queries >= 0)[:, None, :, None]
    if full is None:
        what = shown = seen_by_position(queries, keys, window)
    else:
        what, shown = _by_mask(full, queries, keys)
    sighted = shown.any(3, keepdim=True) & there
    shown = shown | ~sighted  # SDPA makes NaN of rows that see nothing
    if what.dtype == torch.bool:
        what = shown
    else:
        what = torch.where(sighted, what.to(q.dtype), 0.0).masked_fill(~shown, float("-inf"))
    return attend(q, k, v, what, scale, softcap, 0.0).masked_fill(~sighted[:, 0, :, :, None], 0.0)


define(
    "attention_blocks(Tensor? mask, Tensor q_pos, Tensor k_pos, int? window=None) -> (Tensor, Tensor, Tensor)",
    attention_blocks,
)

define(
    "positional_attention(Tensor q, Tensor k, Tensor v, Tensor queries, Tensor keys, Tensor blocks, Tensor? full=None,"
    " float? scale=None, float? softcap=None, int? window=None) -> Tensor",
    positional_attention,
    kernel="vlmrewrite.kernels.attention:positional_attention",
    kernel_fake=attention_fake,
    backward=True,
    flops=attention_flops,
)


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
    """Attention of the newest tokens over all keys of a layer's cache.

    A query sees the keys ``0 <= key <= query``; with a window, of those ``key > query - window``. A query that sees
    nothing gives 0.

    Args:
        q: [B, H, n, D], n small. k: [B, Hk, m, D]. v: [B, Hk, m, Dv], fp16, bf16 or fp32; views of larger buffers with
            any strides. What is in slots that nobody sees must be finite.
        queries: logical positions, int32 [B, n]; -1 for an empty row.
        keys: logical positions, int32 [B, m]; -1 for a slot that nobody sees.
        scale: of the scores, by default ``D ** -0.5``.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        window: of the layers with a sliding window, in tokens.

    Returns:
        [B, n, H, Dv], contiguous, dtype of ``q``.
    """
    seen = seen_by_position(queries, keys, window)
    out = attend(q, k, v, seen, scale, softcap, 0.0)
    return out.masked_fill(~seen.any(-1).transpose(1, 2)[..., None], 0.0)


define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor queries, Tensor keys, float? scale=None,"
    " float? softcap=None, int? window=None) -> Tensor",
    decode_attention,
    attention_fake,
    kernel="vlmrewrite.kernels.decode:decode_attention",
    backward=True,
    flops=attention_flops,
)

POSITIONAL = KERNELS[torch.ops.vlm.positional_attention.default]

FEW = KERNELS[torch.ops.vlm.decode_attention.default]

FAR = 2**30
"""A window that hides nothing."""


class KernelMask(NamedTuple):
    """Which keys each query sees, as kernels take it.

    Attributes:
        queries: logical positions, int32 [B, n].
        keys: logical positions, int32 [B, m]; -1 where no query sees the key.
        blocks: int32 [B, ceil(n / 64), 4], see :func:`attention_blocks`; None for few queries.
        full: a mask [B, 1, Q, K] that decides alone, or None.
        window: number of positions that a query sees, itself included, or None.
    """

    queries: Tensor
    keys: Tensor
    blocks: Tensor | None
    full: Tensor | None
    window: int | None = None


def kernel_mask(mask: Tensor | None, q_pos: Tensor, k_pos: Tensor, plain: bool) -> KernelMask | None:
    """What kernels need to know of the arguments of :func:`vlmrewrite.ops.attention.visible`.

    Returns:
        None for plain causal attention, which PyTorch's own flash attention does.
    """
    if plain:
        return None
    full = mask if mask is not None and mask.dim() == 4 else None
    if full is None and q_pos.shape[1] <= DECODE:
        return KernelMask(q_pos.to(torch.int32), unhidden(mask, k_pos), None, None)
    if full is not None and full.dtype == torch.bool and q_pos.shape[1] == 1:
        return _row(full, q_pos, k_pos)
    return KernelMask(*attention_blocks(mask, q_pos, k_pos), full)


def kernel_mask_softcapped(mask: Tensor | None, q_pos: Tensor, k_pos: Tensor, plain: bool) -> KernelMask | None:
    """:func:`seen` for attention with a softcap, which PyTorch's own flash attention does not do."""
    return kernel_mask(mask, q_pos, k_pos, False)


def _row(full: Tensor, q_pos: Tensor, k_pos: Tensor) -> KernelMask:
    """A full mask of one query a row only hides keys; for the window, the kernel looks for the first that is not."""
    shown = visible(full, q_pos, k_pos, False)
    assert shown is not None
    queries = torch.where(q_pos >= 0, full.shape[-1] - 1, -1).to(torch.int32)
    return KernelMask(queries, torch.where(shown[:, 0, 0], k_pos, -1).to(torch.int32), None, None, FAR)


def kernel_mask_everywhere(mask: Tensor | None, q: Tensor, k: Tensor, plain: bool) -> KernelMask | None:
    """:func:`seen` for q [B, H, n, D] that stand at the last n of the positions 0, 1, ... of k [B, Hk, m, D]."""
    return kernel_mask(mask, *everywhere(q, k), plain)


def kernel_attention(
    q: Tensor, k: Tensor, v: Tensor, what: KernelMask | None, scale: float | None, softcap: float | None
) -> Tensor:
    """Attention: q [B, H, n, D], k [B, Hk, m, D], v [B, Hk, m, Dv], and what :func:`seen` returned.

    Returns:
        [B, n, H, Dv], contiguous.
    """
    if what is None:
        return attend(q, k, v, None, scale, softcap, 0.0)
    if what.blocks is None:
        few: Tensor = FEW(q, k, v, what.queries, what.keys, scale, softcap, what.window)
        return few
    out: Tensor = POSITIONAL(q, k, v, what.queries, what.keys, what.blocks, what.full, scale, softcap, what.window)
    return out
