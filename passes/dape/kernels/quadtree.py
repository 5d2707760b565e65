"""Splitting covers greedily without a queue: where a block stands in the order of splits is known from its parent.

The greedy rule always splits the block with the highest priority, and a 2 x 2 block that waits for its parent can only
be split after it. So a block is split when its **effective** key comes, the lower of its own and, if it waits, its
parent's; blocks with their parent's key follow it at once, by their own. Keys are ordered by priority, then size, then
place, and no two are equal but a parent's and its children's. How many tokens the blocks before a key add is then a
sum, and the last split is found by halving: no sort, one program an image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrewrite.passes.dape.kernels.regions import BLOCKS, FIELDS, FIRST, MORE, block, channels_of, key, table

LOWEST = tl.constexpr(-(2**31))


@triton.jit
def _tree(Table, Member, Priority, image, number, total, BASE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the splits of several 4 x 4 blocks add: keys and costs, per block [N] and per 2 x 2 block in it [N, 4].

    With BASE, the members are the representatives of the 4 x 4 blocks, otherwise Member says it.
    """
    there, place, small, large = block(Table, image, number[:, None, None])
    if BASE:
        member = there & (place == large)
        near = there & (small == large)
    else:
        member = tl.load(Member + place, mask=there, other=0) != 0
        near = tl.load(Member + small, mask=there, other=0) != 0
    missing = there & ~member & (place != small)
    cost = tl.sum(missing.to(tl.int32), 2)
    real = tl.max(there.to(tl.int32), 2) > 0
    has = tl.max((there & near).to(tl.int32), 2) > 0
    quad = tl.max(tl.where(there, small, -1), 2)
    whole = tl.sum((real & ~has).to(tl.int32), 1)
    home = tl.max(tl.max(tl.where(there, large, -1), 2), 1)
    own = key(tl.load(Priority + total + quad, mask=real, other=0.0))
    first = key(tl.load(Priority + 2 * total + home, mask=home >= 0, other=0.0))
    waits = real & (~has | ((whole > 0)[:, None] & (quad == home[:, None])))
    bound = waits & (own > first[:, None])
    return there, place, missing, cost, real & ~has, quad, own, whole, home, first, bound


@triton.jit(do_not_specialize=["total"])
def _nodes(  # type: ignore[no-untyped-def]
    Table, Member, Priority, Key, Order, Cost, total, BASE: tl.constexpr, N: tl.constexpr
) -> None:
    """Effective keys of all splits, five for each 4 x 4 block: its own, and those of its 2 x 2 blocks."""
    image = tl.program_id(1)
    number = tl.program_id(0) * N + tl.arange(0, N)
    _, _, _, cost, _, quad, own, whole, home, first, bound = _tree(Table, Member, Priority, image, number, total, BASE)
    at = (tl.load(Table + image * FIELDS + FIRST) + number) * 5
    inside = number < tl.load(Table + image * FIELDS + BLOCKS)
    tl.store(Key + at, first, mask=inside)
    tl.store(Order + at, home.to(tl.int32), mask=inside)
    tl.store(Cost + at, whole, mask=inside)
    at = at[:, None] + 1 + tl.arange(0, 4)[None, :]
    tl.store(Key + at, tl.where(bound, first[:, None], own), mask=inside[:, None])
    tl.store(Order + at, tl.where(bound, home[:, None], total + quad).to(tl.int32), mask=inside[:, None])
    tl.store(Cost + at, cost, mask=inside[:, None])


@triton.jit
def _cost(Key, Order, Cost, first, count, low, high, before, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cost of the nodes with low <= key < high whose order is less than ``before``."""
    found = tl.zeros((N,), tl.int32)
    for i in range(0, count, N):
        at = i + tl.arange(0, N)
        k = tl.load(Key + first + at, mask=at < count, other=0).to(tl.int64)
        o = tl.load(Order + first + at, mask=at < count, other=0)
        c = tl.load(Cost + first + at, mask=at < count, other=0)
        found += tl.where((k >= low) & (k < high) & (o < before), c, 0)
    return tl.sum(found)


@triton.jit
def cut(Key, Order, Cost, first, count, want, bits, limit, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the sum of costs, in the order of falling keys and rising orders, passes ``want``.

    Args:
        first, count: the nodes that are looked at. bits, limit: orders are less than ``limit = 2 ** bits``.

    Returns:
        the key and the order of the nodes that pass it, and how much of them is wanted; all before them is.
    """
    most = tl.full((), 2147483647, tl.int64)
    value = tl.full((), LOWEST, tl.int64)
    step = most + 1
    for _ in range(32):
        enough = _cost(Key, Order, Cost, first, count, value + step, most + 1, 2147483647, N) >= want
        value = tl.where(enough, value + step, value)
        step = step // 2
    left = want - _cost(Key, Order, Cost, first, count, value + 1, most + 1, 2147483647, N)
    order = tl.full((), 0, tl.int32)
    half = order + limit
    for _ in range(bits):
        half = half // 2
        more = order + half
        enough = _cost(Key, Order, Cost, first, count, value, value + 1, more, N) >= left
        order = tl.where(enough, order, more)
    left -= _cost(Key, Order, Cost, first, count, value, value + 1, order, N)
    return value, order, left


@triton.jit(do_not_specialize=["bits", "limit"])
def _find(Table, Key, Order, Cost, Found, bits, limit, N: tl.constexpr):  # type: ignore[no-untyped-def]
    image = tl.program_id(0)
    at = Table + image * FIELDS
    first, count, want = tl.load(at + FIRST) * 5, tl.load(at + BLOCKS).to(tl.int32) * 5, tl.load(at + MORE)
    value, order, left = cut(Key, Order, Cost, first, count, want.to(tl.int32), bits, limit, N)
    tl.store(Found + image * 3, value)
    tl.store(Found + image * 3 + 1, order.to(tl.int64))
    tl.store(Found + image * 3 + 2, left.to(tl.int64))


@triton.jit(do_not_specialize=["total"])
def _split(  # type: ignore[no-untyped-def]
    Table, Member, Priority, Found, Out, total, BASE: tl.constexpr, N: tl.constexpr
) -> None:
    """The parts that get a token of their own; with BASE also those that had one."""
    image = tl.program_id(1)
    number = tl.program_id(0) * N + tl.arange(0, N)
    there, place, missing, cost, apart, quad, own, whole, home, first, bound = _tree(
        Table, Member, Priority, image, number, total, BASE
    )
    value, order = tl.load(Found + image * 3), tl.load(Found + image * 3 + 1)
    left = tl.load(Found + image * 3 + 2)
    every = (first > value) | ((first == value) & (home < order))
    here = (first == value) & (home == order)
    of_block = tl.where(every, whole, tl.where(here, tl.minimum(left, whole), 0))
    ahead = (own[:, None, :] > own[:, :, None]) | (
        (own[:, None, :] == own[:, :, None]) & (quad[:, None, :] < quad[:, :, None])
    )
    sooner = whole[:, None] + tl.sum(tl.where(ahead & bound[:, None, :], cost[:, None, :], 0), 2)
    alone = (own > value) | ((own == value) & (total + quad < order))
    full = tl.where(bound, every[:, None], alone)
    partly = tl.where(bound, here[:, None], (own == value) & (total + quad == order))
    rest = tl.maximum(tl.where(bound, left - sooner, left), 0)
    of_quad = tl.where(full, cost, tl.where(partly, tl.minimum(rest, cost), 0))
    rank = tl.sum((ahead & apart[:, None, :]).to(tl.int32), 2)
    new_quad = apart & (rank < of_block[:, None])
    mine = key(tl.load(Priority + place, mask=there, other=0.0))
    before = (mine[:, :, None, :] > mine[:, :, :, None]) | (
        (mine[:, :, None, :] == mine[:, :, :, None]) & (place[:, :, None, :] < place[:, :, :, None])
    )
    rank = tl.sum((before & missing[:, :, None, :]).to(tl.int32), 3)
    new = (missing & (rank < of_quad[:, :, None])) | (new_quad[:, :, None] & (place == quad[:, :, None]))
    if BASE:
        new = new | (place == home[:, None, None])
    tl.store(Out + place, new, mask=there)


@triton.jit
def joined(mean, spread, n, x, mask, count, AXIS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Mean and sum of squared distances from it, of n numbers and ``count`` further ones (Chan et al., 1979)."""
    new = tl.sum(tl.where(mask, x, 0.0), AXIS) / count
    away = tl.where(mask, x - tl.expand_dims(new, AXIS), 0.0)
    delta = new - mean
    spread += tl.sum(away * away, AXIS) + delta * delta * (n * count / (n + count))
    return mean + delta * (count / (n + count)), spread


@triton.jit(do_not_specialize=["total"])
def _moments(  # type: ignore[no-untyped-def]
    Table, X, Member, Attention, Out, Mean, Scale, Seen, Most, total, channels, sxf, sxc, saf,
    MATCH: tl.constexpr, C: tl.constexpr,
) -> None:  # fmt: skip
    """One 4 x 4 block: squared distances from averages, and with MATCH what layer norms of the averages need."""
    image, number = tl.program_id(1), tl.program_id(0)
    if number < tl.load(Table + image * FIELDS + BLOCKS):
        there, place, small, large = block(Table, image, number)
        one = there.to(tl.float32)
        n2 = tl.maximum(tl.sum(one, 1), 1.0)
        n4 = tl.sum(tl.sum(one, 1), 0)
        e2, e4 = tl.zeros((4, 4), tl.float32), tl.zeros((4, 4), tl.float32)
        mean1, far1 = tl.zeros((4, 4), tl.float32), tl.zeros((4, 4), tl.float32)
        mean2, far2 = tl.zeros((4,), tl.float32), tl.zeros((4,), tl.float32)
        mean4, far4 = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
        for first in range(0, channels, C):
            c = first + tl.arange(0, C)
            inside = c < channels
            mask = there[:, :, None] & inside[None, None, :]
            x = tl.load(X + (place * sxf)[:, :, None] + (c * sxc)[None, None, :], mask=mask, other=0.0).to(tl.float32)
            m2 = tl.sum(x, 1)
            m4 = tl.sum(m2, 0) / n4
            m2 = m2 / n2[:, None]
            away = tl.where(mask, x - m2[:, None, :], 0.0)
            e2 += tl.sum(away * away, 2)
            away = tl.where(mask, x - m4[None, None, :], 0.0)
            e4 += tl.sum(away * away, 2)
            if MATCH:
                n, count = first * 1.0, tl.minimum(channels - first, C) * 1.0
                mean1, far1 = joined(mean1, far1, n, x, inside[None, None, :], count, 2)
                mean2, far2 = joined(mean2, far2, n, m2, inside[None, :], count, 1)
                mean4, far4 = joined(mean4, far4, n, m4[None, :], inside[None, :], count, 1)
        e2, e4 = e2 / channels, e4 / channels
        p1, p2, p4 = e2, tl.sum(e2, 1), tl.sum(tl.sum(e4, 1), 0)
        if not MATCH:
            own = tl.load(Member + place, mask=there, other=0) != 0
            near = tl.load(Member + small, mask=there, other=0) != 0
            paid = tl.load(Attention + tl.where(own, place, tl.where(near, small, large)) * saf, mask=there, other=0.0)
            p1 = e2 * paid
            p2 = p2 / n2 * tl.sum(tl.where(there & (place == small), paid, 0.0), 1)
            p4 = p4 / n4 * tl.sum(tl.sum(tl.where(there & (place == large), paid, 0.0), 1), 0)
        tl.store(Out + place, p1, mask=there)
        two = tl.zeros((4, 4), tl.float32) + p2[:, None]
        tl.store(Out + total + place, two, mask=there & (place == small))
        tl.store(Out + 2 * total + place, tl.zeros((4, 4), tl.float32) + p4, mask=there & (place == large))
        if MATCH:
            tl.store(Mean + place, mean1, mask=there)
            q, s, one = tl.arange(0, 4)[:, None], tl.arange(0, 4)[None, :], tl.arange(0, 1)
            at = (tl.load(Table + image * FIELDS + FIRST) + number) * 21
            real = tl.sum(there.to(tl.int32), 1) > 0
            tl.store(Scale + at + q * 4 + s, tl.where(there, 1.0 / tl.sqrt(far1 / channels + 1e-5), 0.0))
            tl.store(Scale + at + 16 + tl.arange(0, 4), tl.where(real, 1.0 / tl.sqrt(far2 / channels + 1e-5), 0.0))
            tl.store(Scale + at + 20 + one, 1.0 / tl.sqrt(far4 / channels + 1e-5))
            tl.store(Seen + at + q * 4 + s, tl.zeros((4, 4), tl.float32))
            tl.store(Seen + at + 16 + tl.arange(0, 4), p2 / n2)
            tl.store(Seen + at + 20 + one, p4 / n4 + tl.zeros((1,), tl.float32))
            tl.atomic_max(Most + image, tl.maximum(tl.max(p2 / n2, 0), p4 / n4))


def moments(
    images: Tensor, blocks: int, features: Tensor, member: Tensor | None = None, attention: Tensor | None = None
) -> tuple[Tensor, ...]:
    """How far features are from their averages, in one pass over them.

    Args:
        images, blocks: of :func:`vlmrewrite.passes.dape.kernels.regions.table`. features: [F, C].
        member, attention: bool [F] and fp32 [F], or neither.

    Returns:
        With attention, the priority of ``dape_split``, fp32 [3, F]. Without, the squared errors of blocks, [3, F]; and
        of each 4 x 4 block's 16 locations, 4 smaller blocks and itself, [21 N], the inverse standard deviation over
        channels, 0 where there is none, and the visual density; the means of locations over channels, [F], and the
        largest density of each image, [I].
    """
    total, match = len(features), attention is None
    out = torch.empty(3, total, dtype=torch.float32, device=features.device)
    n = blocks * len(images) * 21 if match else 0
    scale, seen = torch.empty(2, n, dtype=torch.float32, device=features.device)
    mean, most = torch.empty(total, device=features.device), torch.zeros(len(images), device=features.device)
    width = channels_of(features)
    if blocks:
        held, paid = (out, out) if member is None or attention is None else (member, attention)
        _moments[(blocks, len(images))](
            images, features, held, paid, out, mean, scale, seen, most, total, features.shape[1], *features.stride(),
            paid.stride(-1), MATCH=match, C=width, num_warps=4,
        )  # fmt: skip
    return (out, scale, seen, mean, most) if match else (out,)


def dape_split(
    attention: Tensor, features: Tensor, grid: Tensor, member: Tensor, lengths: Tensor, keep: Tensor
) -> Tensor:
    """Launcher of ``dape_split``: the features are read once."""
    images, blocks = table(lengths, grid, member.device, keep.tolist())
    cover = ~member.contiguous()
    return refined(images, blocks, moments(images, blocks, features, cover, attention)[0], cover)


def refined(images: Tensor, blocks: int, priority: Tensor, member: Tensor | None) -> Tensor:
    """As :func:`vlmrewrite.passes.dape.regions.refined`, bool [F]; without ``member`` from the 4 x 4 blocks on.

    Args:
        images, blocks: of :func:`.regions.table`, with how many tokens to add to each image.
        priority: fp32 [3, F], contiguous.
        member: bool [F], contiguous; holds the representatives of all 4 x 4 blocks.
    """
    total, base = priority.shape[1], member is None
    out = torch.empty(total, dtype=torch.bool, device=priority.device)
    if not total:
        return out
    nodes = torch.empty(3, blocks * len(images) * 5, dtype=torch.int32, device=priority.device)
    found = torch.empty(len(images), 3, dtype=torch.int64, device=priority.device)
    grid, held = (triton.cdiv(blocks, 16), len(images)), out if member is None else member
    _nodes[grid](images, held, priority, *nodes, total, BASE=base, N=16, num_warps=2)
    size = min(4096, max(64, triton.next_power_of_2(blocks * 5)))
    bits = (2 * total).bit_length()
    _find[(len(images),)](images, *nodes, found, bits, 2**bits, N=size, num_warps=8)
    _split[grid](images, held, priority, found, out, total, BASE=base, N=16, num_warps=4)
    return out
