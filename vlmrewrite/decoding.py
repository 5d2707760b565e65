"""Attention of a few new tokens against a cache whose slots carry logical positions; see :mod:`vlmrewrite.dialect`."""

from __future__ import annotations

from torch import Tensor

from vlmrewrite.dialect import attend, attention_fake, attention_flops, define
from vlmrewrite.positional import seen_by_position


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
