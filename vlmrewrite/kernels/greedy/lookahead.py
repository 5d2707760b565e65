"""Greedy sampling of more rows than fit into registers: what the next picks may need, computed in one pass.

Reading all rows once for each pick would take the time of that reading. Instead a pass computes, by tensor cores, what
every row would add to its potential for each of some candidates: those with the least potentials, of which many of the
next picks are. While they are, a pick costs one column of numbers; if one is not, another pass is made. The picks are
the same whatever the candidates.

|x|^2 + |y|^2 - 2xy cancels where rows are alike: if a pick has a row nearer than :data:`NEAR` of the sum of their
squares, its distances are computed from differences instead. Equal rows have equal potentials, and the first is picked.
Of others whose potentials are nearer than products round, it may pick another one than the reference, which computes
such potentials from differences.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vlmrewrite.kernels.greedy.messages import NOTHING, exchange, message, row_of, take
from vlmrewrite.kernels.greedy.start import ordered

EPSILON = tl.constexpr(1e-6)
"""Added to squared distances by the repulsion rule."""

NEAR = tl.constexpr(1 / 64)


@triton.jit
def _differences(  # type: ignore[no-untyped-def]
    x, out, pick, begin, stop, stride_n, stride_c, C: tl.constexpr, TILE: tl.constexpr, DEEP: tl.constexpr
):  # fmt: skip
    """Squared distances of the rows from begin to stop and the pick, by their differences: out [length]."""
    p_at = x + pick.to(tl.int64) * stride_n
    for begun in range(begin, stop, TILE):
        row = begun + tl.arange(0, TILE)
        there = row < stop
        a_at = x + row.to(tl.int64)[:, None] * stride_n
        total = tl.zeros([TILE], tl.float32)
        for c in range(0, C, DEEP):
            at = c + tl.arange(0, DEEP)
            step, some = at.to(tl.int64) * stride_c, at < C
            p = tl.load(p_at + step, mask=some, other=0.0).to(tl.float32)[None, :]
            d = tl.load(a_at + step[None, :], mask=there[:, None] & some[None, :], other=0.0).to(tl.float32) - p
            total += tl.sum(d * d, 1)
        tl.store(out + row, total, mask=there)


@triton.jit
def _pass(  # type: ignore[no-untyped-def]
    x, norm, out, candidates, begin, stop, length, stride_n, stride_c,
    RULE: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, DEEP: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Squared distances, or cosines, of the rows from begin to stop and each candidate [AHEAD]: out [AHEAD, length]."""
    valid = candidates >= 0
    of = tl.where(valid, candidates, 0)
    of_norm = tl.load(norm + of)
    j = tl.arange(0, AHEAD)
    b_at = x + of.to(tl.int64)[:, None] * stride_n
    for begun in range(begin, stop, TILE):
        row = begun + tl.arange(0, TILE)
        there = row < stop
        a_at = x + row.to(tl.int64)[:, None] * stride_n
        acc = tl.zeros([TILE, AHEAD], tl.float32)
        for c in tl.range(0, C, DEEP, num_stages=STAGES):
            at = c + tl.arange(0, DEEP)
            step = (at.to(tl.int64) * stride_c)[None, :]
            some = (at < C)[None, :]
            a = tl.load(a_at + step, mask=there[:, None] & some, other=0.0)
            b = tl.load(b_at + step, mask=valid[:, None] & some, other=0.0)
            acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
        own = tl.load(norm + row, mask=there, other=0.0)
        if RULE == "repulsion":
            value = own[:, None] + of_norm[None, :] - 2.0 * acc
        else:
            value = acc * own[:, None] * of_norm[None, :]
        tl.store(out + (j[None, :] * length + row[:, None]), value, mask=there[:, None] & valid[None, :])


@triton.jit
def search(  # type: ignore[no-untyped-def]
    x, member, first, norm, gains, slots, order, out, begin, stop, length, rank, group, keep,
    stride_n, stride_c, stride_m,
    RULE: tl.constexpr, C: tl.constexpr, HELD: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    DEEP: tl.constexpr, AHEAD: tl.constexpr, EACH: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Search the rows from begin to stop, at most HELD, with a group; ``gains`` [AHEAD, length] is scratch."""
    row = begin + tl.arange(0, HELD)
    there = row < stop
    live = tl.load(member + row.to(tl.int64) * stride_m, mask=there, other=0) != 0
    score = tl.load(first + row, mask=there, other=0)
    own = tl.load(norm + row, mask=there, other=0.0)
    u = tl.full([HELD], 0.0 if RULE == "repulsion" else -float("inf"), tl.float32)
    lists = slots + keep.to(tl.int64) * group
    j = tl.arange(0, AHEAD)
    candidates = tl.full([AHEAD], -1, tl.int32)
    best = tl.min(tl.where(live, message(score, row), NOTHING), 0)
    if RULE == "repulsion":
        score = ~score  # the farthest from the mean are likely next
    pick = take(best, 0, slots, order, out, begin, stop, rank, group, GROUP)
    for t in range(1, keep):
        live = live & (row != pick)
        column = tl.max(tl.where(candidates == pick, j, -1), 0)
        if column < 0:
            key = tl.where(t == 1, score, ordered(u))
            offered = tl.where(live, message(key, row), NOTHING)
            candidates = row_of(exchange(offered, lists, rank, group, EACH, AHEAD))
            lists += group * EACH
            column = AHEAD - 1
            candidates = tl.where(j == column, pick, candidates)
            _pass(
                x, norm, gains, candidates, begin, stop, length, stride_n, stride_c,
                RULE, C, TILE, DEEP, AHEAD, PRECISION, STAGES,
            )  # fmt: skip
            tl.debug_barrier()  # what one thread stored, others load
        found = gains + column * length
        gain = tl.load(found + row, mask=there, other=0.0)
        if RULE == "repulsion":
            apart = gain >= NEAR * (own + tl.load(norm + pick))  # not so where it is no number
            if tl.max((live & ~apart).to(tl.int32), 0) > 0:
                _differences(x, found, pick, begin, stop, stride_n, stride_c, C, TILE, DEEP)
                tl.debug_barrier()
                gain = tl.load(found + row, mask=there, other=0.0)
            u += tl.div_rn(1.0, gain + EPSILON)
        else:
            u = tl.maximum(u, gain)
        best = tl.min(tl.where(live, message(ordered(u), row), NOTHING), 0)
        pick = take(best, t, slots, order, out, begin, stop, rank, group, GROUP)
