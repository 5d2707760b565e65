"""Greedy sampling of tokens by diversity, all images of a batch in one launch.

Each image is searched by a group of programs, each of which keeps the potentials of its own rows. At each step they
publish the best row they have, wait for what the others of the group publish (:mod:`.messages`), and
go on from the best of all. All programs of a group must run at the same time: there are never more than the device has
multiprocessors.

Rows that fit are kept in registers, their distances sums of squared differences, as in the references; for others see
:mod:`vlmrewrite.kernels.greedy.lookahead`. Potentials are summed in fp32, where the reference of repulsion sums in
fp64: of tokens whose potentials are nearer than that rounds, another may be picked.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrewrite.kernels.greedy.lookahead import EPSILON, search
from vlmrewrite.kernels.greedy.messages import NOTHING, message, take
from vlmrewrite.kernels.greedy.start import aligned, closest, distances, load, ordered
from vlmrewrite.kernels.launch import processors
from vlmrewrite.ops import interpreted

WIDEST = 2**14
"""Channels, at most."""

KEPT = 2**15
"""Elements that a program keeps in registers: in fp32, half of them."""

HELD = 2**11
"""Rows whose potentials a program keeps in registers."""

AHEAD, EACH = 128, 32
"""Candidates that a pass looks at, and how many of them one program may offer."""

FIELDS = tl.constexpr(10)
"""Numbers in a program's row of the table that :func:`_share` makes."""

BLOCK, WARPS = 1024, 8


@triton.jit
def _kept(  # type: ignore[no-untyped-def]
    x_ptr, member, first, norm, slots, order, out, begin, stop, rank, group, keep,
    stride_n, stride_c, stride_m,
    RULE: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Search with all rows of this program in registers."""
    row = begin + tl.arange(0, ROWS)
    there = row < stop
    live = tl.load(member + row.to(tl.int64) * stride_m, mask=there, other=0) != 0
    x = load(x_ptr, row, live, stride_n, stride_c, C, COLS)
    u = tl.full([ROWS], 0.0 if RULE == "repulsion" else -float("inf"), tl.float32)
    own = tl.load(norm + row, mask=there, other=0.0)
    best = tl.min(tl.where(live, message(tl.load(first + row, mask=there, other=0), row), NOTHING), 0)
    pick = take(best, 0, slots, order, out, begin, stop, rank, group, GROUP)
    for t in range(1, keep):
        cols = tl.arange(0, COLS)
        at = x_ptr + pick.to(tl.int64) * stride_n + cols.to(tl.int64) * stride_c
        p = (tl.load(at) if C == COLS else tl.load(at, mask=cols < C, other=0.0)).to(tl.float32)[None, :]
        if RULE == "repulsion":
            d = x - p
            u += tl.div_rn(1.0, tl.sum(d * d, 1) + EPSILON)
        else:
            u = tl.maximum(u, tl.sum(x * p, 1) * own * tl.load(norm + pick))
        live = live & (row != pick)
        best = tl.min(tl.where(live, message(ordered(u), row), NOTHING), 0)
        pick = take(best, t, slots, order, out, begin, stop, rank, group, GROUP)


@triton.jit
def _greedy_kernel(  # type: ignore[no-untyped-def]
    x, member, first, norm, gains, slots, order, out, table, stride_n, stride_c, stride_m,
    RULE: tl.constexpr, C: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    GROUP: tl.constexpr, TILE: tl.constexpr, DEEP: tl.constexpr, AHEAD: tl.constexpr, EACH: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = table + tl.program_id(0) * FIELDS
    start = tl.load(at + 1)
    length, keep = tl.load(at + 2).to(tl.int32), tl.load(at + 3).to(tl.int32)
    begin, stop = tl.load(at + 4).to(tl.int32), tl.load(at + 5).to(tl.int32)
    rank, group = tl.load(at + 6).to(tl.int32), tl.load(at + 7).to(tl.int32)
    slots += tl.load(at + 8)
    order += tl.load(at + 9)
    x += start * stride_n
    member += start * stride_m
    first += start
    norm += start
    gains += start * AHEAD
    out += start
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
            x, member, first, norm, slots, order, out, begin, stop, rank, group, keep,
            stride_n, stride_c, stride_m, RULE, C, ROWS, COLS, GROUP,
        )  # fmt: skip
    else:
        search(
            x, member, first, norm, gains, slots, order, out, begin, stop, length, rank, group, keep,
            stride_n, stride_c, stride_m, RULE, C, ROWS, GROUP, TILE, DEEP, AHEAD, EACH, PRECISION, STAGES,
        )  # fmt: skip


def repulsion(features: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """The tokens that repel one another most, see :func:`greedy`."""
    return greedy("repulsion", features, member, lengths, keep)[0]


def cosine(features: Tensor, member: Tensor, lengths: Tensor, keep: Tensor) -> Tensor:
    """The tokens that are farthest apart by their angles, see :func:`greedy`."""
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
    ahead: int = AHEAD,
) -> tuple[Tensor, Tensor]:
    """Greedy sampling with the order of its picks.

    Args:
        rule: ``"repulsion"`` or ``"cosine"``.
        features: [F, C], any float dtype and strides; C at most 16384.
        member: tokens that may be chosen, bool [F].
        lengths: tokens of each image, int64 [I], sum F, on the CPU.
        keep: how many to choose of each image, int64 [I], on the CPU.
        rows: a program's tokens are a multiple of it, a power of two; with one of them they are kept in registers.
        width: programs that can run at the same time; by default the device's multiprocessors.
        ahead: candidates of a pass, a power of two from 16 on.

    Returns:
        The chosen tokens, bool [F]. And the picks of each image that has more members than it keeps, in order, counted
        from the image's first token: int32 [sum of min(length, keep)], where those of other images are undefined.

    Raises:
        ValueError: more channels than the kernels take.
    """
    channels, device = features.shape[1], features.device
    if channels > WIDEST:
        raise ValueError(f"features have {channels} channels; expected at most {WIDEST}")
    if features.dtype == torch.float64:
        features = features.float()
    found = torch.zeros(member.shape, dtype=torch.bool, device=device)
    width = width or (1 if interpreted() else processors(device))  # interpreted programs run one after another
    sizes, budgets = lengths.tolist(), keep.tolist()
    orders, start, image = [], 0, 0
    for n in _waves(sizes, budgets, width):
        images = slice(image, image + n)
        these = slice(start, start + sum(sizes[images]))
        given = features[these], member[these], found[these]
        orders.append(_search(rule, *given, sizes[images], budgets[images], rows, width, ahead))
        start, image = these.stop, images.stop
    return found, orders[0] if len(orders) == 1 else torch.cat([features.new_empty(0, dtype=torch.int32), *orders])


def _waves(lengths: list[int], keep: list[int], width: int) -> list[int]:
    """Images of each launch: as many as can be searched at once, one at least."""
    waves: list[list[int]] = [[]]
    for n, k in zip(lengths, keep, strict=True):
        wave = [*waves[-1], _needed(n, width) if n and k else 0]
        if sum(wave) > width and max(wave) > 1 and len(wave) > 1:
            waves.append(wave[-1:])
        else:
            waves[-1] = wave
    return list(map(len, waves))


def _needed(n: int, width: int) -> int:
    """Programs that hold the potentials of n tokens, where so many can run at the same time."""
    return min(width, -(-n // HELD))


def _search(
    rule: str,
    features: Tensor,
    member: Tensor,
    out: Tensor,
    lengths: list[int],
    keep: list[int],
    rows: int | None,
    width: int,
    ahead: int,
) -> Tensor:
    """One launch: writes the chosen tokens to ``out``, and returns the order."""
    channels, device, single = features.shape[1], features.device, features.dtype == torch.float32
    cols = max(16, triton.next_power_of_2(channels))
    vectors = aligned(features)
    share = _share(lengths, keep, rows or min(KEPT // cols, 16), width)
    whole = share.tiles <= 1
    if not whole:
        share = _share(lengths, keep, rows or 16, width, ahead)
    order = torch.empty(share.picks, dtype=torch.int32, device=device)
    if not share.programs:
        return order
    table = torch.tensor(share.table, dtype=torch.int64, device="cpu")
    table = (table.pin_memory() if device.type == "cuda" else table).to(device, non_blocking=True)
    spans = table[share.programs * FIELDS.value :]
    first, norm = (distances if rule == "repulsion" else closest)(features, member, spans, share.longest)
    group = triton.next_power_of_2(share.group)
    held = share.rows if whole else triton.next_power_of_2(share.most)
    ahead = max(16, group * share.each)
    gains = torch.empty(0 if whole else len(member) * ahead, dtype=torch.float32, device=device)
    slots = torch.zeros(share.slots, dtype=torch.int64, device=device)
    _greedy_kernel[(share.programs,)](
        features, member, first, norm, gains, slots, order, out, table, *features.stride(), member.stride(0),
        RULE=rule, C=channels, WHOLE=whole, ROWS=held, COLS=cols,
        GROUP=max(group, 32 * WARPS) if group > 1 else 1, TILE=max(16, min(32 if single else 64, held)),
        DEEP=(32 if single else 64) if vectors else 16, AHEAD=ahead, EACH=share.each,
        PRECISION="tf32x3" if single else "ieee", STAGES=3, BLOCK=BLOCK, num_warps=WARPS, maxnreg=255,
        launch_cooperative_grid=share.group > 1,
    )  # fmt: skip
    return order


class _Share(NamedTuple):
    """Which program searches what.

    Attributes:
        table: :data:`FIELDS` numbers for each program, then first token and number of tokens of each image.
        group: programs of the image that has most.
        tiles: tiles of the program that has most.
        most: its tokens.
        rows: tokens of a tile.
        each: candidates that each program offers to a pass, 0 where there is none.
        slots: messages that are sent at most.
        picks: tokens that are chosen at most.
        longest: tokens of the largest image.
    """

    table: list[int]
    programs: int
    group: int
    tiles: int
    most: int
    rows: int
    each: int
    slots: int
    picks: int
    longest: int


def _share(lengths: list[int], keep: list[int], rows: int, width: int, ahead: int = 0) -> _Share:
    """Give each image that has something to keep a group of programs, by its share of the work.

    No more than ``width`` programs in all, unless there are more images: then each image has one program, and none
    waits for another. With candidates to look ``ahead`` at, no more programs for an image than these, and no fewer than
    hold its potentials.
    """
    table: list[int] = []
    spans: list[int] = []
    at = slots = picks = 0
    work = [n * min(n, k) for n, k in zip(lengths, keep, strict=True)]
    least = [min(_needed(n, width) if ahead else 1, w) for n, w in zip(lengths, work, strict=True)]
    spare = max(0, width - sum(least))
    images: list[tuple[int, int, int, int, int]] = []
    for n, k, w, few in zip(lengths, keep, work, least, strict=True):
        if w:
            tiles = triton.cdiv(n, rows)
            many = min(tiles, few + spare * w // sum(work), ahead or tiles)
            each = triton.cdiv(tiles, many)
            images.append((at, n, min(n, k), triton.cdiv(tiles, each), each))
        at += n
    group = max((g for *_, g, _ in images), default=1)
    most: int = triton.next_power_of_2(group)
    offered = max(1, min(EACH, ahead // most)) if ahead else 0
    for image, (start, n, k, programs, each) in enumerate(images):
        for rank in range(programs):
            begin = rank * each * rows
            table += image, start, n, k, begin, min(n, begin + each * rows), rank, programs, slots, picks
        spans += start, n
        slots += programs * k * (1 + offered)
        picks += k
    slots = slots if group > 1 or ahead else 0  # a program that is alone tells nobody
    tiles = max((each for *_, each in images), default=0)
    longest_part = max((min(n, each * rows) for _, n, _, _, each in images), default=0)
    longest = max((n for _, n, *_ in images), default=0)
    return _Share(
        table + spans, len(table) // FIELDS.value, group, tiles, longest_part, rows, offered, slots, picks, longest
    )
