"""How programs that search together agree: each says what it has to offer, and waits for what the others say.

What is said is one positive int64, in a place of its own that nothing else is ever written to, so that no fence or
counter is needed: 0 is "not said yet". All programs of a group must run at the same time.

Where warps hold copies of one element, they may have loaded it at different moments. So a pick is taken from no fewer
elements than the program has threads, each of which then holds one; and lists are loaded again when all is said.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(2**63 - 1)
"""The message of a program that has no row to offer; it is after all others."""

ROW_BITS = tl.constexpr(31)

ROW = tl.constexpr(2**31 - 1)


@triton.jit
def message(key, row):  # type: ignore[no-untyped-def]
    """An int32 key and a row in one int64: least key first, then first row; positive."""
    return ((key.to(tl.int64) + 2147483648) << ROW_BITS) | (row + 1).to(tl.int64)


@triton.jit
def row_of(said):  # type: ignore[no-untyped-def]
    """The row in a message; -1 for :data:`NOTHING`."""
    return tl.where(said == NOTHING, -1, ((said & ROW) - 1).to(tl.int32))


@triton.jit
def _all_said(at, n, N: tl.constexpr):  # type: ignore[no-untyped-def]
    """The n messages from ``at`` on, waited for; NOTHING behind them: [N]."""
    i = tl.arange(0, N)
    said = tl.load(at + i, mask=i < n, other=NOTHING, volatile=True)
    while tl.min((said != 0).to(tl.int32), 0) == 0:
        said = tl.load(at + i, mask=i < n, other=NOTHING, volatile=True)
    return said


@triton.jit
def take(mine, t, slots, order, out, begin, stop, rank, group, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Note pick number t of a group, of which program number ``rank`` offers ``mine``, and return its row.

    GROUP is 1 for a group of one, else at least the group's programs and this one's threads.
    """
    if GROUP > 1:
        at = slots + t * group
        tl.atomic_xchg(at + rank, mine, sem="relaxed")
        mine = tl.min(_all_said(at, group, GROUP), 0)
    pick = row_of(mine)
    tl.store(order + t, pick, mask=rank == 0)
    tl.store(out + pick, 1, mask=(pick >= begin) & (pick < stop))
    return pick


@triton.jit
def exchange(mine, at, rank, group, EACH: tl.constexpr, ALL: tl.constexpr):  # type: ignore[no-untyped-def]
    """The ``EACH`` least of this program's messages [R] and those of all others: [ALL], NOTHING behind them."""
    for i in range(EACH):
        least = tl.min(mine, 0)
        tl.atomic_xchg(at + rank * EACH + i, least, sem="relaxed")
        mine = tl.where(mine == least, NOTHING, mine)
    _all_said(at, group * EACH, ALL)
    i = tl.arange(0, ALL)
    return tl.load(at + i, mask=i < group * EACH, other=NOTHING, volatile=True)
