"""Attention by kernels: what a layer's queries see, worked out once for all layers that share the token sets."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmrewrite import decoding as decoding
from vlmrewrite import dialect
from vlmrewrite.choice import DECODE
from vlmrewrite.dialect import KERNELS
from vlmrewrite.positional import attention_blocks, unhidden

POSITIONAL = KERNELS[torch.ops.vlm.positional_attention.default]
FEW = KERNELS[torch.ops.vlm.decode_attention.default]
FAR = 2**30
"""A window that hides nothing."""


class Seen(NamedTuple):
    """Which keys each query sees, as kernels take it.

    Attributes:
        queries: logical positions, int32 [B, n].
        keys: logical positions, int32 [B, m]; -1 where no query sees the key.
        blocks: int32 [B, ceil(n / 64), 4], see :func:`vlmrewrite.positional.attention_blocks`; None for few queries.
        full: a mask [B, 1, Q, K] that decides alone, or None.
        window: number of positions that a query sees, itself included, or None.
    """

    queries: Tensor
    keys: Tensor
    blocks: Tensor | None
    full: Tensor | None
    window: int | None = None


def seen(mask: Tensor | None, q_pos: Tensor, k_pos: Tensor, plain: bool) -> Seen | None:
    """What kernels need to know of the arguments of :func:`vlmrewrite.dialect.visible`.

    Returns:
        None for plain causal attention, which PyTorch's own flash attention does.
    """
    if plain:
        return None
    full = mask if mask is not None and mask.dim() == 4 else None
    if full is None and q_pos.shape[1] <= DECODE:
        return Seen(q_pos.to(torch.int32), unhidden(mask, k_pos), None, None)
    if full is not None and full.dtype == torch.bool and q_pos.shape[1] == 1:
        return _row(full, q_pos, k_pos)
    return Seen(*attention_blocks(mask, q_pos, k_pos), full)


def seen_masked(mask: Tensor | None, q_pos: Tensor, k_pos: Tensor, plain: bool) -> Seen | None:
    """:func:`seen` for attention with a softcap, which PyTorch's own flash attention does not do."""
    return seen(mask, q_pos, k_pos, False)


def _row(full: Tensor, q_pos: Tensor, k_pos: Tensor) -> Seen:
    """A full mask of one query a row only hides keys; for the window, the kernel looks for the first that is not."""
    shown = dialect.visible(full, q_pos, k_pos, False)
    assert shown is not None
    queries = torch.where(q_pos >= 0, full.shape[-1] - 1, -1).to(torch.int32)
    return Seen(queries, torch.where(shown[:, 0, 0], k_pos, -1).to(torch.int32), None, None, FAR)


def seen_everywhere(mask: Tensor | None, q: Tensor, k: Tensor, plain: bool) -> Seen | None:
    """:func:`seen` for q [B, H, n, D] that stand at the last n of the positions 0, 1, ... of k [B, Hk, m, D]."""
    return seen(mask, *dialect.everywhere(q, k), plain)


def attend(q: Tensor, k: Tensor, v: Tensor, what: Seen | None, scale: float | None, softcap: float | None) -> Tensor:
    """Attention: q [B, H, n, D], k [B, Hk, m, D], v [B, Hk, m, Dv], and what :func:`seen` returned.

    Returns:
        [B, n, H, Dv], contiguous.
    """
    if what is None:
        return dialect.attend(q, k, v, None, scale, softcap, 0.0)
    if what.blocks is None:
        few: Tensor = FEW(q, k, v, what.queries, what.keys, scale, softcap, what.window)
        return few
    out: Tensor = POSITIONAL(q, k, v, what.queries, what.keys, what.blocks, what.full, scale, softcap, what.window)
    return out
