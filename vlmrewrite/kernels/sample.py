"""Greedy sampling of tokens by diversity, all images of a batch in one launch.

Each image is searched by a group of programs, each of which keeps the potentials of its own rows. At each step they
publish the best row they have, wait for what the others of the group publish, and go on from the best of all. What is
published is one word that says all, in a place of its own for each step, so that no fence or counter is needed.
All programs of a group must run at the same time: there are never more than the device has multiprocessors.

Rows that fit are kept in registers; others stream through shared memory at each step. Distances are sums of squared
differences, as in the references: |x|^2 + |y|^2 - 2xy cancels where tokens are alike, and saves no memory traffic.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrewrite.kernels import interpreted
from vlmrewrite.kernels.first_pick import aligned, closest, load, mean, ordered

EPSILON = tl.constexpr(1e-6)
"""Added to squared distances by the repulsion rule."""
NOTHING = tl.constexpr(2**63 - 1)
"""The message of a program that has no row to offer; it is after all others."""
LOW = tl.constexpr(0xFFFFFFFF)
KEPT = 2**15
"""Elements that a program keeps in registers: in fp32, half of them."""
STREAMED = 2**14
"""Elements of a tile that streams."""
FIELDS = tl.constexpr(10)
"""Numbers in a program's row of the table that :func:`_share` makes."""
BLOCK = 1024


# --- messages: potential and row in one int64, least first, then the first row; NaN comes last; never 0, not yet sent


@triton.jit
def _message(ordered, row):  # type: ignore[no-untyped-def]
    return (ordered.to(tl.int64) << 32) | (row + 1).to(tl.int64)


@triton.jit
def _row(message):  # type: ignore[no-untyped-def]
    return ((message & LOW) - 1).to(tl.int32)


# --- one image


@triton.jit
def _load_one(x, stride_c, C: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row at x as fp32 [1, COLS]."""
    cols = tl.arange(0, COLS).to(tl.int64)
    at = x + cols * stride_c
    values = tl.load(at) if C == COLS else tl.load(at, mask=cols < C, other=0.0)
    return values.to(tl.float32)[None, :]


@triton.jit
def _absorb(u, x, inverse, p, inverse_p, RULE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Potentials u [rows] of the rows x [rows, COLS] after the pick p [1, COLS]."""
    if RULE == "repulsion":
        d = x - p
        u += tl.div_rn(1.0, tl.sum(d * d, 1) + EPSILON)
    else:
        u = tl.maximum(u, tl.sum(x * p, 1) * inverse * inverse_p)
    return u


@triton.jit
def _first(x, row, there, first, RULE: tl.constexpr, C: tl.constexpr, COLS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the first pick has least of, ordered: distance to the mean, or cosine to the closest other."""
    if RULE == "repulsion":
        d = x - _load_one(first, 1, C, COLS)
        score = ordered(tl.sum(d * d, 1))
    else:
        score = tl.load(first + row, mask=there, other=0)
    return score


@triton.jit
def _choose(best, t, slots, order, out, begin, stop, rank, group, GROUP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Agree with the group on pick number t, note it, and return its row."""
    if GROUP > 1:
        slots += t * group
        tl.atomic_xchg(slots + rank, best, sem="relaxed")
        other = tl.arange(0, GROUP)
        sent = tl.load(slots + other, mask=other < group, other=NOTHING, volatile=True)
        while tl.min((sent != 0).to(tl.int32), 0) == 0:
            sent = tl.load(slots + other, mask=other < group, other=NOTHING, volatile=True)
        best = tl.min(sent, 0)
    pick = _row(best)
    tl.store(order + t, pick, mask=rank == 0)
    tl.store(out + pick, 1, mask=(pick >= begin) & (pick < stop))
    return pick


@triton.jit
def _kept(  # type: ignore[no-untyped-def]
    x_ptr, member, first, inverse_ptr, slots, order, out, begin, stop, rank, group, keep,
    stride_n, stride_c, stride_m,
    RULE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Search with all rows of this program in registers."""
    row = begin + tl.arange(0, ROWS)
    there = row < stop
    live = tl.load(member + row.to(tl.int64) * stride_m, mask=there, other=0) != 0
    x = load(x_ptr, row, live, stride_n, stride_c, C, COLS)
    if RULE == "repulsion":
        inverse, u = 0.0, tl.zeros([ROWS], tl.float32)
    else:
        inverse, u = tl.load(inverse_ptr + row, mask=there, other=0.0), tl.full([ROWS], -float("inf"), tl.float32)
    best = tl.min(tl.where(live, _message(_first(x, row, there, first, RULE, C, COLS), row), NOTHING), 0)
    pick = _choose(best, 0, slots, order, out, begin, stop, rank, group, GROUP)
    for t in range(1, keep):
        p = _load_one(x_ptr + pick.to(tl.int64) * stride_n, stride_c, C, COLS)
        inverse_p = 0.0 if RULE == "repulsion" else tl.load(inverse_ptr + pick)
        u = _absorb(u, x, inverse, p, inverse_p, RULE)
        live = live & (row != pick)
        best = tl.min(tl.where(live, _message(ordered(u), row), NOTHING), 0)
        pick = _choose(best, t, slots, order, out, begin, stop, rank, group, GROUP)


@triton.jit
def _streamed(  # type: ignore[no-untyped-def]
    x_ptr, member, first, inverse_ptr, potential, slots, order, out, begin, stop, rank, group, keep,
    stride_n, stride_c, stride_m, RULE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Search with the rows read again at each step, a tile at a time."""
    NONE: tl.constexpr = 0.0 if RULE == "repulsion" else -float("inf")
    best = tl.full([1], NOTHING, tl.int64)
    for at in range(begin, stop, ROWS):
        row = at + tl.arange(0, ROWS)
        there = row < stop
        live = tl.load(member + row.to(tl.int64) * stride_m, mask=there, other=0) != 0
        x = load(x_ptr, row, live, stride_n, stride_c, C, COLS)
        scored = _message(_first(x, row, there, first, RULE, C, COLS), row)
        best = tl.minimum(best, tl.min(tl.where(live, scored, NOTHING), 0))
        tl.store(potential + row, tl.zeros([ROWS], tl.float32) + NONE, mask=there)
    pick = _choose(tl.min(best, 0), 0, slots, order, out, begin, stop, rank, group, GROUP)
    for t in range(1, keep):
        tl.debug_barrier()  # what one thread stored, others load
        p = _load_one(x_ptr + pick.to(tl.int64) * stride_n, stride_c, C, COLS)
        inverse_p = 0.0 if RULE == "repulsion" else tl.load(inverse_ptr + pick)
        best = tl.full([1], NOTHING, tl.int64)
        for at in tl.range(begin, stop, ROWS, num_stages=STAGES):
            row = at + tl.arange(0, ROWS)
            there = row < stop
            live = tl.load(member + row.to(tl.int64) * stride_m, mask=there, other=0) != 0
            live = live & (tl.load(out + row, mask=there, other=1) == 0)
            x = load(x_ptr, row, there, stride_n, stride_c, C, COLS)
            u = tl.load(potential + row, mask=there, other=0.0)
            inverse = 0.0 if RULE == "repulsion" else tl.load(inverse_ptr + row, mask=there, other=0.0)
            u = _absorb(u, x, inverse, p, inverse_p, RULE)
            tl.store(potential + row, u, mask=there)
            best = tl.minimum(best, tl.min(tl.where(live, _message(ordered(u), row), NOTHING), 0))
        pick = _choose(tl.min(best, 0), t, slots, order, out, begin, stop, rank, group, GROUP)


@triton.jit
def _greedy_kernel(  # type: ignore[no-untyped-def]
    x, member, first, inverse, potential, slots, order, out, table, stride_n, stride_c, stride_m,
    RULE: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUP: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = table + tl.program_id(0) * FIELDS
    image, start = tl.load(at), tl.load(at + 1)
    length, keep = tl.load(at + 2).to(tl.int32), tl.load(at + 3).to(tl.int32)
    begin, stop = tl.load(at + 4).to(tl.int32), tl.load(at + 5).to(tl.int32)
    rank, group = tl.load(at + 6).to(tl.int32), tl.load(at + 7).to(tl.int32)
    slots += tl.load(at + 8)
    order += tl.load(at + 9)
    x += start * stride_n
    member += start * stride_m
    inverse += start
    potential += start
    out += start
    first += image * C if RULE == "repulsion" else start
    block = tl.arange(0, BLOCK)
    members = tl.zeros([BLOCK], tl.int32)
    for n in range(0, length, BLOCK):
        there = n + block < length
        members += tl.load(member + (n + block).to(tl.int64) * stride_m, mask=there, other=0).to(tl.int32)
    if tl.sum(members, 0) <= keep:
        for n in range(begin, stop, BLOCK):
            there = n + block < stop
            live = tl.load(member + (n + block).to(tl.int64) * stride_m, mask=there, other=0)
            tl.store(out + n + block, live, mask=there)
    elif WHOLE:
        _kept(
            x, member, first, inverse, slots, order, out, begin, stop, rank, group, keep,
            stride_n, stride_c, stride_m, RULE, C, ROWS, COLS, GROUP,
        )  # fmt: skip
    else:
        _streamed(
            x, member, first, inverse, potential, slots, order, out, begin, stop, rank, group, keep,
            stride_n, stride_c, stride_m, RULE, C, ROWS, COLS, GROUP, STAGES,
        )  # fmt: skip


# --- launchers


def sts_sample(features: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """See :func:`vlmrewrite.passes.sts.sts_sample`; at most 16384 channels."""
    return greedy("repulsion", features, member, lengths, keep)[0]


def divprune_sample(features: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """See :func:`vlmrewrite.passes.divprune.divprune_sample`; at most 16384 channels."""
    return greedy("cosine", features, member, lengths, keep)[0]


def greedy(
    rule: str,
    features: Tensor,
    member: Tensor,
    lengths: Tensor,
    keep: Tensor,
    *,
    rows: int | None = None,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Greedy sampling with the order of its picks.

    Args:
        rule: ``"repulsion"`` or ``"cosine"``.
        features: [F, C], any float dtype and strides; C at most 16384.
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each image, int64 [I], sum F, on the CPU.
        keep: how many to choose of each image, int64 [I], on the CPU.
        rows: tokens of a tile, a power of two; by default as many as the registers take.
        width: programs that can run at the same time; by default the device's multiprocessors.

    Returns:
        The chosen tokens, bool [F]. And the picks of each image that has more members than it keeps, in order, counted
        from the image's first token: int32 [sum of min(length, keep)], where those of other images are undefined.

    Raises:
        ValueError: more channels than a tile has room for.
    """
    channels, device = features.shape[1], features.device
    if channels > STREAMED:
        raise ValueError(f"features have {channels} channels; expected at most {STREAMED}")
    if features.dtype == torch.float64:
        features = features.float()
    cols = max(16, triton.next_power_of_2(channels))
    width, vectors = width or _width(device), aligned(features)
    share = _share(lengths.tolist(), keep.tolist(), rows or min(KEPT // cols, 16), width)
    whole = share.tiles <= 1
    if not whole:
        streamed = STREAMED // cols if vectors else max(1, STREAMED // cols // 2)
        share = _share(lengths.tolist(), keep.tolist(), rows or min(streamed, 64), width)
    out = torch.zeros(member.shape, dtype=torch.bool, device=device)
    order = torch.empty(share.picks, dtype=torch.int32, device=device)
    if not share.programs:
        return out, order
    table = torch.tensor(share.table, dtype=torch.int64)
    table = (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)
    spans = table[share.programs * FIELDS.value :]
    scratch = torch.empty(features.shape[0], dtype=torch.float32, device=device)
    if rule == "repulsion":
        first, inverse = mean(features, member, spans), scratch
    else:
        first, inverse = closest(features, member, spans, share.longest, share.rows)
    _greedy_kernel[(share.programs,)](
        features, member, first, inverse, scratch, torch.zeros(share.slots, dtype=torch.int64, device=device),
        order, out, table, *features.stride(), member.stride(0),
        RULE=rule, C=channels, WHOLE=whole, ROWS=share.rows, COLS=cols, GROUP=triton.next_power_of_2(share.group),
        STAGES=3 if vectors else 1, BLOCK=BLOCK, num_warps=8 if whole else 16, maxnreg=255 if whole else 128,
        launch_cooperative_grid=share.group > 1,
    )  # fmt: skip
    return out, order


def _width(device: torch.device) -> int:
    if interpreted():
        return 1  # they run one after another
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


class _Share(NamedTuple):
    """Which program searches what.

    Attributes:
        table: :data:`FIELDS` numbers for each program, then first token and number of tokens of each image.
        group: programs of the image that has most.
        tiles: tiles of the program that has most.
        rows: tokens of a tile.
        slots: messages that are sent at most.
        picks: tokens that are chosen at most.
        longest: tokens of the largest image.
    """

    table: list[int]
    programs: int
    group: int
    tiles: int
    rows: int
    slots: int
    picks: int
    longest: int


def _share(lengths: list[int], keep: list[int], rows: int, width: int) -> _Share:
    """Give each image that has something to keep a group of programs, by its share of the work.

    No more than ``width`` programs in all, unless there are more images: then each image has one program, and none
    waits for another.
    """
    table: list[int] = []
    spans: list[int] = []
    start = slots = picks = most = most_tiles = longest = 0
    work = [n * min(n, k) for n, k in zip(lengths, keep, strict=True)]
    spare = max(0, width - sum(w > 0 for w in work))
    for n, k, w in zip(lengths, keep, work, strict=True):
        if w:
            tiles = triton.cdiv(n, rows)
            each = triton.cdiv(tiles, min(tiles, 1 + spare * w // sum(work)))
            group, k = triton.cdiv(tiles, each), min(n, k)
            for rank in range(group):
                begin = rank * each * rows
                table += len(spans) // 2, start, n, k, begin, min(n, begin + each * rows), rank, group, slots, picks
            spans += start, n
            slots += group * k
            picks += k
            most, most_tiles, longest = max(most, group), max(most_tiles, each), max(longest, n)
        start += n
    programs = len(table) // FIELDS.value
    slots = slots if most > 1 else 0
    return _Share(table + spans, programs, most, most_tiles, rows, slots, picks, longest)
