"""Regions of an image's token grid: blocks of 1, 2 and 4 locations a side, covers made of them, matches with text.

An image's F' = rows * columns tokens stand in row-major order; blocks are cut from the upper left, those at the right
and lower border may be smaller. A block's **representative** is a location nearest to its centre, and always that of
one of the smaller blocks inside it, so that a set of representatives says by itself which cover it is:

    a location belongs to itself if it is in the set, else to its 2 x 2 block's representative if that is, else to its
    4 x 4 block's.

Any set that holds the representatives of all 4 x 4 blocks therefore covers every location exactly once. Everything here
runs in eager PyTorch and Python; F counts the locations of all images of a call, I the images.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from vlmrewrite.ops import define

SCALES = (1, 2, 4)


@functools.lru_cache(maxsize=256)
def _blocks(rows: int, columns: int) -> tuple[Tensor, tuple[dict[int, list[int]], ...]]:
    """One grid's representatives [3, F'], and what each block of scales 2 and 4 is made of, by representative."""
    at = torch.arange(rows * columns, device="cpu")
    found = []
    for scale in SCALES:
        place = []
        for x, n in ((at // columns, rows), (at % columns, columns)):
            first = x // scale * scale
            place.append(first + (n - first).clamp(max=min(scale, 2)) // 2)
        found.append(place[0] * columns + place[1])
    parts: tuple[dict[int, list[int]], ...] = ({}, {}, {})
    for level in (1, 2):
        for small, large in zip(found[level - 1].tolist(), found[level].tolist(), strict=True):
            inside = parts[level].setdefault(large, [])
            if small not in inside:
                inside.append(small)
    return torch.stack(found), parts


def sizes(lengths: Tensor, grid: Tensor) -> list[tuple[int, int]]:
    """Rows and columns of each image.

    Args:
        lengths, grid: as for :func:`representatives`.

    Raises:
        ValueError: an image has not as many tokens as its grid.
    """
    found = [(int(r), int(c)) for r, c in grid.tolist()]
    if [r * c for r, c in found] != lengths.tolist():
        raise ValueError(f"the grids {grid.tolist()} do not account for images of {lengths.tolist()} tokens")
    return found


def representatives(lengths: Tensor, grid: Tensor) -> Tensor:
    """The representative of the block that each location lies in, at each of :data:`SCALES`.

    Args:
        lengths: tokens of each image, int64 [I], on the CPU.
        grid: rows and columns of each image, int64 [I, 2], on the CPU.

    Returns:
        int64 [3, F], on the CPU, numbers of locations of all images.

    Raises:
        ValueError: an image has not as many tokens as its grid.
    """
    found, start = [], 0
    for rows, columns in sizes(lengths, grid):
        found.append(_blocks(rows, columns)[0] + start)
        start += rows * columns
    return torch.cat(found, 1) if found else torch.zeros(3, 0, dtype=torch.int64, device="cpu")


def owners(member: Tensor, blocks: Tensor) -> Tensor:
    """The token that covers each location, int64 [F].

    Args:
        member: the tokens of the cover, bool [F].
        blocks: what :func:`representatives` returned, on the device of ``member``.
    """
    return torch.where(member, blocks[0], torch.where(member[blocks[1]], blocks[1], blocks[2]))


def region_owner(member: Tensor, lengths: Tensor, grid: Tensor) -> Tensor:
    """The token that covers each location, and the scale of the region that a token stands for.

    Args:
        member: bool [F]. lengths, grid: as for :func:`representatives`.

    Returns:
        int64 [2, F]: owners, and levels, indices into :data:`SCALES` of the smallest block that holds all locations of
        the owner's region.
    """
    blocks = representatives(lengths, grid).to(member.device)
    owner = owners(member, blocks)
    beyond = (blocks[0] != owner).long() + (blocks[1] != blocks[1][owner]).long()
    level = torch.zeros_like(owner).scatter_reduce(0, owner, beyond, "amax")
    return torch.stack([owner, level[owner]])


def pool(x: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Averages over regions.

    Args:
        x: [F, C]. owner: the token that stands for each location, int64 [F].

    Returns:
        means [F, C] in fp32 (fp64 for fp64), and numbers of locations [F] in the same dtype; both 0 where no region is.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    count = x.new_zeros(len(x)).index_add(0, owner, x.new_ones(len(x)))
    total = torch.zeros_like(x).index_add(0, owner, x)
    return total / count.clamp(min=1)[:, None], count


def deviation(x: Tensor, owner: Tensor) -> Tensor:
    """Squared distance of each location from its region's average, mean over channels: x [F, C], owner [F] -> [F]."""
    mean, _ = pool(x, owner)
    return (x.to(mean.dtype) - mean[owner]).square().mean(1)


def density(x: Tensor, owner: Tensor) -> Tensor:
    """Visual density of each region, the variance inside it, mean over channels: x [F, C], owner [F] -> [F]."""
    return pool(deviation(x, owner)[:, None], owner)[0][:, 0]


def affordable(grid: Tensor, keep: Sequence[int]) -> list[int]:
    """How many tokens each image has in its cover by 4 x 4 blocks.

    Args:
        grid, keep: as for :func:`coarsest`.

    Raises:
        ValueError: an image may not have so many.
    """
    found = []
    for (rows, columns), k in zip(grid.tolist(), keep, strict=True):
        least = -(-rows // 4) * -(-columns // 4)
        if k < least:
            raise ValueError(
                f"a budget of {k} tokens cannot cover an image of {rows} x {columns} tokens with regions of at most"
                f" 4 x 4; expected at least {least}"
            )
        found.append(least)
    return found


def coarsest(lengths: Tensor, grid: Tensor, keep: Sequence[int]) -> Tensor:
    """The cover by 4 x 4 blocks, bool [F], on the CPU.

    Args:
        lengths, grid: as for :func:`representatives`.
        keep: how many tokens each image may have.

    Raises:
        ValueError: they are too few.
    """
    blocks = representatives(lengths, grid)
    affordable(grid, keep)
    return torch.zeros(blocks.shape[1], dtype=torch.bool, device="cpu").index_fill(0, blocks[2], True)


def refined(member: Tensor, lengths: Tensor, grid: Tensor, priority: Tensor, more: Sequence[int]) -> Tensor:
    """Split the regions of a cover, always the one with the highest priority next.

    A region of 4 x 4 is split into regions of 2 x 2, one of those into locations; at the border of the grid, one that
    a block of 2 x 2 holds whole counts as that block. The token that stood for it goes on as that of the part where it
    stands. The last split may be a partial one: as many parts get a token of their own as
    may still be added, those with the highest priority; the others stay with the region's token. Ties go to the
    larger block, then to the first.

    Args:
        member: the tokens of the cover, bool [F].
        lengths, grid: as for :func:`representatives`.
        priority: of each block, at its representative, by scale, float [3, F].
        more: how many tokens to add to each image; at most as many as there are locations without one.

    Returns:
        the tokens added, bool [F], on the device of ``member``.
    """
    inside, values = member.tolist(), priority.nan_to_num(0.0).tolist()
    added: list[int] = []
    start = 0
    for (rows, columns), n, k in zip(grid.tolist(), lengths.tolist(), more, strict=True):
        end, parts = start + n, _blocks(rows, columns)[1]
        image = [v[start:end] for v in values]
        added += (start + f for f in _split(inside[start:end], parts, image, k)) if k else ()
        start = end
    out = torch.zeros(len(inside), dtype=torch.bool, device="cpu")
    return out.index_fill(0, torch.tensor(added, dtype=torch.int64, device="cpu"), True).to(member.device)


def _split(
    inside: list[bool], parts: tuple[dict[int, list[int]], ...], priority: list[list[float]], k: int
) -> list[int]:
    """The tokens that one image's cover gets in addition."""
    heap: list[tuple[float, int, int, list[int]]] = []
    added: list[int] = []

    def push(level: int, block: int) -> bool:
        missing = [part for part in parts[level][block] if not inside[part]]
        if missing:
            heapq.heappush(heap, (-priority[level][block], -level, block, missing))
        return bool(missing)

    for large, small in parts[2].items():
        whole = push(2, large)  # its first part has no token of its own yet
        for block in small:
            if inside[block] and not (whole and block == large):
                push(1, block)
    while k and heap:
        _, minus, block, missing = heapq.heappop(heap)
        level, taken = -minus, missing
        if k < len(missing):
            taken = sorted(missing, key=lambda part: (-priority[level - 1][part], part))[:k]
        for part in taken:
            inside[part] = True
        added += taken
        k -= len(taken)
        if level == 2:
            for part in (block, *missing):
                push(1, part)
    return added


define(
    "region_owner(Tensor member, Tensor lengths, Tensor grid) -> Tensor",
    region_owner,
    lambda member, *_: member.new_empty(2, member.shape[0], dtype=torch.int64),
    kernel="vlmrewrite.passes.dape.kernels.regions:region_owner",
)
