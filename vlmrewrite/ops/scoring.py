"""What policies choose by: attention received, the best of each image, and the check of what they chose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from vlmrewrite.ops.attention import products, visible
from vlmrewrite.ops.library import REFERENCES, define, kinds


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
    """Attention weight that each vision token receives, mean over heads and query tokens.

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
    scores = products(q.float(), k.float())
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


_LEFT: ContextVar[Sequence[int] | None] = ContextVar("vlmrewrite_left", default=None)


@contextmanager
def counted(left: Sequence[int]) -> Iterator[None]:
    """While the block runs, in this context, policies are told how many tokens may be chosen of each image.

    So what they do can be traced: no size in it depends on numbers in tensors.
    """
    token = _LEFT.set(left)
    try:
        yield
    finally:
        _LEFT.reset(token)


def is_counted() -> bool:
    """Whether policies are told how many tokens may be chosen, and are to look at no number in a tensor."""
    return _LEFT.get() is not None


def left_of(member: Tensor, start: int, n: int, i: int) -> Tensor:
    """The tokens that may be chosen of image ``i``, whose ``n`` tokens begin at ``start``: int64 [m], ascending.

    Args:
        member: tokens that may be chosen, bool [F].
    """
    here, known = member[start : start + n], _LEFT.get()
    found = here.nonzero()[:, 0] if known is None else (~here).to(torch.int8).argsort(stable=True)[: known[i]]
    return start + found


def per_image(member: Tensor, lengths: Tensor, keep: Tensor, choose: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """The loop of a policy that looks at each image for itself: what most references of policies are made of.

        def loudest(features, member, lengths, keep):
            return per_image(
                member, lengths, keep, lambda left, k, i: features[left].norm(dim=1).argsort(descending=True)[:k]
            )

    Args:
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each image, int64 [I], sum F, on the CPU.
        keep: how many to choose of each image, int64 [I], on the CPU; of an image that has fewer, all.
        choose: called as ``choose(left, k, i)`` for image ``i`` with the tokens that are left of it, int64 [m],
            ascending indices into F, and how many to choose, 1 <= k <= m; returns positions in ``left``, int64 [k].

    Returns:
        the chosen tokens, bool [F].
    """
    chosen, start = torch.zeros_like(member), 0
    for i, (n, k) in enumerate(zip(lengths.tolist(), keep.tolist(), strict=True)):
        left = left_of(member, start, n, i)
        k = min(k, len(left))
        if k:
            try:
                chosen[left[choose(left, k, i)]] = True
            except Exception as e:
                e.add_note(
                    f"in per_image, for image {i}: choose(left, {k}, {i}) with int64 [{len(left)}] as `left`; expected"
                    f" {k} positions in it, int64 in 0 .. {len(left) - 1}"
                )
                raise
        start += n
    return chosen


def least_of(values: Tensor, left: Tensor) -> Tensor:
    """The index of the least value of those that are left, a number or not: what is none is the largest.

    Args:
        values: float [n].
        left: bool [n], at least one.
    """
    most = torch.finfo(values.dtype).max
    return torch.where(left, values.nan_to_num(nan=most, posinf=most), torch.inf).argmin()


def shared_out(weights: Tensor, room: Tensor, total: int) -> Tensor:
    """A total in whole parts, as near to the proportions of ``weights`` as there is room.

    What the largest parts cannot take goes to the others in their proportions; what is left of rounding, one each, to
    those with the largest remainder, ties to the first.

    Args:
        weights: float [T], 0 or larger, not all 0.
        room: the most that each can be, int64 [T].
        total: at most the sum of ``room``.

    Returns:
        int64 [T] on the CPU, sum ``total``.
    """
    weights, room = weights.double().cpu().clamp(min=1e-300), room.cpu()
    parts = torch.zeros_like(room)
    while left := total - int(parts.sum()):
        ideal = left * weights.where(parts < room, 0.0) / weights.where(parts < room, 0.0).sum()
        more = torch.minimum(ideal.floor().long(), room - parts)
        if not bool(more.any()):
            fraction = ideal.where(parts < room, -1.0)
            more.scatter_(0, fraction.argsort(descending=True, stable=True)[:left], 1)
            more.masked_fill_(parts >= room, 0)
        parts += more
    return parts


def like_member(*arguments: object) -> Tensor:
    """The fake of any policy's operator, for :func:`define`: the shape of what it returns.

        define("loudest(Tensor features, Tensor member, Tensor lengths, Tensor keep) -> Tensor", loudest, like_member)

    Args:
        *arguments: those of the operator: any inputs, ``member``, ``lengths``, ``keep``, and whatever follows.

    Returns:
        an empty tensor, bool [F], on the device of ``member``.

    Raises:
        ValueError: not exactly one argument is of the kind of ``member``, bool [F].
    """
    found = [x for x in arguments if isinstance(x, Tensor) and x.dtype == torch.bool and x.dim() == 1]
    if len(found) != 1:
        raise ValueError(
            f"like_member expects arguments of which one, `member`, is bool [F], got {kinds(arguments)}; give `define`"
            " a fake of your own, which returns torch.empty_like(member)"
        )
    return torch.empty_like(found[0])


def greedy_flops(features: Tensor, member: Tensor, lengths: Tensor, keep: Tensor, **_: object) -> int:
    """FLOPs of a policy that measures the distance of all of an image's tokens to each that it chooses, 3 a channel.

    For :func:`define` as ``flops``, with ``flops_by_value=True``.

    Args:
        features: [F, C].
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each image, int64 [I], on the CPU.
        keep: how many to choose of each image, int64 [I], on the CPU.
        **_: what else the counter gives.

    Returns:
        their number.
    """
    pairs = zip(lengths.tolist(), keep.tolist(), strict=True)
    total: int = 3 * features.shape[1] * sum(n * min(n, k) for n, k in pairs)
    return total


def top_attention(weights: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """The ``keep`` tokens of each image with the largest weight; ties go to the first token.

    Args:
        weights: float [F]; NaN is larger than any number, as in ``torch.sort``.
        member, lengths, keep: see :class:`vlmrewrite.plan.Policy`.

    Returns:
        the chosen tokens, bool [F].
    """
    sizes, device = lengths.tolist(), member.device
    shape, equal = (len(sizes), max(sizes, default=0)), len({*sizes}) <= 1
    if equal:
        weights, left = weights.reshape(shape), member.reshape(shape)
    else:
        firsts = ((i * shape[1], n) for i, n in enumerate(sizes))
        at = torch.cat([torch.arange(first, first + n, device=device) for first, n in firsts])
        weights, left = (x.new_zeros(shape).flatten().scatter(0, at, x).view(shape) for x in (weights, member))
    order = weights.argsort(dim=1, descending=True, stable=True)
    best = left.gather(1, order)
    best &= best.cumsum(1, dtype=torch.int32) <= keep.to(device)[:, None]
    chosen = torch.zeros_like(left).scatter(1, order, best).flatten()
    return chosen if equal else chosen[at]


def checked(chosen: Tensor, member: Tensor, lengths: Tensor, keep: Tensor, name: str) -> Tensor:
    """What a policy chose, if that is what it was asked for.

    Args:
        chosen: bool [F]. member, lengths, keep: what the policy was given, see :class:`vlmrewrite.plan.Policy`.
        name: of the policy.

    Raises:
        ValueError: it is not bool [F], has tokens that were not there to choose, or more than ``keep`` of an image, or
            fewer although more are left.
    """
    if chosen.dtype != torch.bool or chosen.shape != member.shape:
        raise ValueError(
            f"policy {name!r} returned {str(chosen.dtype).removeprefix('torch.')} {tuple(chosen.shape)}; expected bool"
            f" {tuple(member.shape)}"
        )
    here, there = torch.stack([chosen, member]).cpu()  # at once: the device waits for the host but one time
    image = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths)
    none = torch.zeros(len(lengths), dtype=torch.int64, device="cpu")
    counts, left = (none.index_add(0, image, x.long()) for x in (here, there))
    told, least = f"policy {name!r} chose {counts.tolist()} tokens of the images; expected", torch.minimum(keep, left)
    if bool((counts > keep).any()) or bool((here & ~there).any()):
        raise ValueError(f"{told} at most {keep.tolist()}, and only tokens that are left")
    if bool((counts < least).any()):  # the index has room for them, and would be filled up with others
        raise ValueError(f"{told} {least.tolist()}, for that many are asked for and left")
    return chosen


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
