"""The dialect: semantic operations on token sets, each defined by its PyTorch reference.

Every function here without a leading underscore is the *meaning* of the ``torch.ops.vlm`` operator of the same name.
Rewritten graphs contain the operators; lowering replaces each by its reference or by a kernel. Shapes use B rows, T
tokens of the full sequence, n tokens of a set, H heads (Hk of keys), D head size, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmrewrite.operators import KERNELS, OPAQUE, REFERENCES, define

__all__ = ["KERNELS", "OPAQUE", "REFERENCES", "define"]


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
    n, m, causal = q.shape[2], k.shape[2], False
    if seen is None and n > 1:  # a branch, since a symbolic comparison is no bool that the kernel below would take
        if n == m:
            causal = True
        else:
            seen = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)[None, None]
    gqa = q.shape[1] != k.shape[1]
    if gqa and seen is not None:
        k, v, gqa = _repeat(k, q.shape[1]), _repeat(v, q.shape[1]), False
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=gqa
    )
    return out.transpose(1, 2).contiguous()


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _attend_softcapped(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scale: float | None, softcap: float, dropout: float
) -> Tensor:
    scores = q @ _repeat(k, q.shape[1]).transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.tanh(scores / softcap) * softcap
    if seen is None:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    bias = seen if seen.dtype != torch.bool else torch.zeros_like(scores).masked_fill(~seen, float("-inf"))
    weights = (scores + bias).softmax(-1, dtype=torch.float32).nan_to_num(0.0).to(q.dtype)
    return (F.dropout(weights, dropout) @ _repeat(v, q.shape[1])).transpose(1, 2).contiguous()


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


def kv_append(
    keys: Tensor | None, values: Tensor | None, positions: Tensor | None, k: Tensor, v: Tensor, pos: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Grow one layer's cache: keys [B, Hk, m, D], values [B, Hk, m, Dv] and logical positions int64 [B, m] together.

    The first three are None for an empty cache; a position of -1 marks an empty slot.
    """
    if keys is None or values is None or positions is None:
        return k, v, pos
    return torch.cat([keys, k], 2), torch.cat([values, v], 2), torch.cat([positions, pos], 1)


def token_index(member: Tensor, padding: Tensor | None, n: int) -> tuple[Tensor, Tensor]:
    """The members of a token set as a sorted index of fixed length.

    Args:
        member: bool [B, T].
        padding: bool [B, T], True for real tokens, or None.
        n: length; at least the largest number of members in a row. Rows with fewer members are filled up with
            padding tokens first, then with others, all marked invalid.

    Returns:
        index int64 [B, n], ascending in each row; valid bool [B, n].
    """
    rank = member.to(torch.int8) * 2
    if padding is not None:
        rank = rank + (~padding).to(torch.int8)
    index = rank.argsort(dim=1, descending=True, stable=True)[:, :n].sort(dim=1).values
    return index, member.gather(1, index)


def select(x: Tensor, index: Tensor, dim: int = 1) -> Tensor:
    """Gather the tokens of a set: x [B or 1, ..., T, ...] with T at ``dim``, index [B, n] -> [B, ..., n, ...]."""
    if index.shape[0] == 1 and x.shape[0] == 1:
        return x.index_select(dim, index[0])
    x = x.expand(index.shape[0], *x.shape[1:]).movedim(dim, 1)
    rows = torch.arange(index.shape[0], device=x.device)[:, None]
    return x[rows, index].movedim(1, dim)


def relative_index(outer: Tensor, index: Tensor) -> Tensor:
    """Where the tokens of ``index`` [B, n] stand in the larger set ``outer`` [B, m]; both ascending in each row.

    Empty slots of ``index`` point at some token of ``outer``.
    """
    return torch.searchsorted(outer, index).clamp(max=outer.shape[1] - 1)


def restore(full: Tensor, part: Tensor, index: Tensor, valid: Tensor) -> Tensor:
    """Write the valid rows of ``part`` [B, n, C] over ``full`` [B, T, C] at ``index`` [B, n]; the rest is kept."""
    at = index[..., None].expand(-1, -1, full.shape[-1])
    return full.scatter(1, at, torch.where(valid[..., None], part, full.gather(1, at)))


def positions(index: Tensor, valid: Tensor, past: int) -> Tensor:
    """Logical positions of a set's tokens, int64 [B, n]: ``past`` tokens came before; -1 where not valid."""
    return torch.where(valid, index + past, -1)


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
    """Attention weight that each vision token receives, mean over heads and query tokens (STS, stage 2).

    The softmax runs in fp32 over all visible keys, cached ones included. A query token that sees nothing gives 0.

    Args:
        q: the query tokens of each row [B, H, t, D]. k: [B, Hk, m, D], the last n of them the current tokens.
        q_pos: their logical positions, int64 [B, t]; those at -1 are left out of the mean. k_pos: int64 [B, m].
        index, valid: the current tokens' set, [B, n].
        flat: ``row * length + column`` of each vision token, int64 [F].
        length: T.

    Returns:
        fp32 [F].
    """
    scores = q.float() @ _repeat(k, q.shape[1]).float().transpose(2, 3)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    seen = visible(mask, q_pos, k_pos, False)
    assert seen is not None
    bias = seen if seen.dtype != torch.bool else torch.zeros_like(scores).masked_fill(~seen, float("-inf"))
    scores = scores + bias
    nothing = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.softmax(-1).masked_fill(nothing, 0.0).mean(1)[..., k.shape[2] - index.shape[1] :]
    asked = (q_pos >= 0)[..., None]
    weights = weights.masked_fill(~asked, 0.0).sum(1) / asked.sum(1).clamp(min=1)
    full = weights.new_zeros(index.shape[0], length).scatter(1, index, weights.masked_fill(~valid, 0.0))
    return full.flatten()[flat]


def per_image(member: Tensor, lengths: Tensor, keep: Tensor, choose: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """The loop of a policy that looks at each image for itself.

    Args:
        member, lengths, keep: what the policy was given, see :class:`vlmrewrite.tokens.Policy`.
        choose: called as ``choose(left, k, i)`` for image ``i`` with the tokens that are left of it, int64 [m],
            ascending indices into F, and how many to choose, 1 <= k <= m; returns positions in ``left``, int64 [k].

    Returns:
        the chosen tokens, bool [F].
    """
    chosen, start = torch.zeros_like(member), 0
    for i, (n, k) in enumerate(zip(lengths.tolist(), keep.tolist(), strict=True)):
        left = start + member[start : start + n].nonzero()[:, 0]
        k = min(k, len(left))
        if k:
            chosen[left[choose(left, k, i)]] = True
        start += n
    return chosen


def like_member(_: Tensor, member: Tensor, *__: object) -> Tensor:
    """What a policy returns that goes by one tensor: bool [F]."""
    return torch.empty_like(member)


def greedy_flops(features: Tensor, member: Tensor, lengths: Tensor, keep: Tensor, **_: object) -> int:
    """FLOPs of a policy that measures the distance of all of an image's tokens to each that it chooses, 3 a channel."""
    pairs = zip(lengths.tolist(), keep.tolist(), strict=True)
    total: int = 3 * features.shape[1] * sum(n * min(n, k) for n, k in pairs)
    return total


def top_attention(weights: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """The ``keep`` tokens of each image with the largest weight; ties go to the first token.

    Args:
        weights: float [F]; NaN is larger than any number, as in ``torch.sort``.
        member, lengths, keep: see :class:`vlmrewrite.tokens.Policy`.

    Returns:
        the chosen tokens, bool [F].
    """
    return per_image(member, lengths, keep, lambda left, k, _: weights[left].argsort(descending=True, stable=True)[:k])


def checked(chosen: Tensor, member: Tensor, lengths: Tensor, keep: Tensor, name: str) -> Tensor:
    """What a policy chose, if that is what it was asked for.

    Args:
        chosen: bool [F]. member, lengths, keep: what the policy was given, see :class:`vlmrewrite.tokens.Policy`.
        name: of the policy.

    Raises:
        ValueError: it is not bool [F], holds tokens that were not there to choose, or more than ``keep`` of an image.
    """
    if chosen.dtype != torch.bool or chosen.shape != member.shape:
        raise ValueError(
            f"policy {name!r} returned {str(chosen.dtype).removeprefix('torch.')} {tuple(chosen.shape)}; expected bool"
            f" {tuple(member.shape)}"
        )
    here, there = torch.stack([chosen, member]).cpu()  # at once: the device waits for the host but one time
    image = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
    counts = torch.zeros(len(lengths), dtype=torch.int64, device="cpu").index_add(0, image, here.long())
    if bool((counts > keep).any()) or bool((here & ~there).any()):
        raise ValueError(
            f"policy {name!r} chose {counts.tolist()} tokens of the images; expected at most {keep.tolist()}, and only"
            " tokens that are left"
        )
    return chosen


def member(text: Tensor | None, vision: Tensor | None, chosen: Tensor | None) -> Tensor:
    """Members of a token set as bool [B, T].

    Args:
        text: text tokens to include, bool [B, T], or None.
        vision: the vision tokens, bool [B, T], with ``chosen`` bool [F] saying which of them belong; or None.
    """
    if vision is None or chosen is None:
        assert text is not None
        return text.clone()
    kept = torch.zeros_like(vision).masked_scatter(vision, chosen)
    return kept if text is None else kept | text


def attention_fake(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    """The output of any attention of q [B, H, n, D], k and v [B, Hk, m, Dv]: [B, n, H, Dv]."""
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


def _kv_append_op(
    keys: Tensor | None, values: Tensor | None, positions: Tensor | None, k: Tensor, v: Tensor, pos: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if keys is None:
        return k.clone(), v.clone(), pos.clone()  # an operator's output must not be its input
    return kv_append(keys, values, positions, k, v, pos)


def _kv_append_fake(
    keys: Tensor | None, values: Tensor | None, positions: Tensor | None, k: Tensor, v: Tensor, pos: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    past = 0 if keys is None else keys.shape[2]
    n = past + k.shape[2]
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
    "kv_append(Tensor? keys, Tensor? values, Tensor? positions, Tensor k, Tensor v, Tensor pos)"
    " -> (Tensor, Tensor, Tensor)",
    _kv_append_op,
    _kv_append_fake,
)
ATTENTION, KV_APPEND = torch.ops.vlm.attention.default, torch.ops.vlm.kv_append.default
REFERENCES[KV_APPEND] = kv_append
define("token_index(Tensor member, Tensor? padding, SymInt n) -> (Tensor, Tensor)", token_index)
define("select(Tensor x, Tensor index, int dim=1) -> Tensor", select)
define("relative_index(Tensor outer, Tensor index) -> Tensor", relative_index)
define(
    "restore(Tensor full, Tensor part, Tensor index, Tensor valid) -> Tensor",
    restore,
    kernel="vlmrewrite.kernels.gather:restore",
    backward=True,
)
define("positions(Tensor index, Tensor valid, SymInt past) -> Tensor", positions)
define("member(Tensor? text, Tensor? vision, Tensor? chosen) -> Tensor", member)
define(
    "checked(Tensor chosen, Tensor member, Tensor lengths, Tensor keep, str name) -> Tensor",
    lambda *args: checked(*args).clone(),
    lambda chosen, *_: torch.empty_like(chosen),
)
REFERENCES[torch.ops.vlm.checked.default] = checked
define(
    "attention_received(Tensor q, Tensor k, Tensor? mask, Tensor q_pos, Tensor k_pos, float? scale,"
    " float? softcap, Tensor index, Tensor valid, Tensor flat, SymInt length) -> Tensor",
    attention_received,
    kernel="vlmrewrite.kernels.score:attention_received",
    kernel_fake=lambda q, *args: q.new_empty(args[8].shape[0], dtype=torch.float32),
    flops=lambda q, k, *_, **__: 2 * math.prod(q) * k[2],
)
define(
    "top_attention(Tensor weights, Tensor member, Tensor lengths, Tensor keep) -> Tensor",
    top_attention,
    like_member,
    kernel="vlmrewrite.kernels.score:top_attention",
)
