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
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from vlmrewrite.ops import define

SCALES = (1, 2, 4)


@functools.lru_cache(maxsize=256)
def _blocks(rows: int, columns: int) -> Tensor:
    """One grid's representatives [3, F']."""
    at = torch.arange(rows * columns, device="cpu")
    found = []
    for scale in SCALES:
        place = []
        for x, n in ((at // columns, rows), (at % columns, columns)):
            first = x // scale * scale
            place.append(first + (n - first).clamp(max=min(scale, 2)) // 2)
        found.append(place[0] * columns + place[1])
    return torch.stack(found)


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
        found.append(_blocks(rows, columns) + start)
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


def pool(x: Tensor, owner: Tensor, tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Averages over regions.

    Args:
        x: [F, C]. owner: the token that stands for each location, int64 [F].
        tokens: how many there are, F by default.

    Returns:
        means [tokens, C] in fp32 (fp64 for fp64), and numbers of locations [tokens] in the same dtype; both 0 where no
        region is.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    tokens = len(x) if tokens is None else tokens
    count = x.new_zeros(tokens).index_add(0, owner, x.new_ones(len(x)))
    total = x.new_zeros(tokens, x.shape[1]).index_add(0, owner, x)
    return total / count.clamp(min=1)[:, None], count


def deviation(x: Tensor, owner: Tensor) -> Tensor:
    """Squared distance of each location from its region's average, mean over channels: x [F, C], owner [F] -> [F]."""
    mean, _ = pool(x, owner)
    return (x.to(mean.dtype) - mean[owner]).square().mean(1)


def density(x: Tensor, owner: Tensor) -> Tensor:
    """Visual density of each region, the variance inside it, mean over channels: x [F, C], owner [F] -> [F]."""
    return pool(deviation(x, owner)[:, None], owner)[0][:, 0]


def numbered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The blocks of one scale, by their representatives.

    Args:
        blocks: that of each location's block, int64 [F].

    Returns:
        representatives, ascending, int64 [R]; which of them each location's is, int64 [F].
    """
    found = (blocks == torch.arange(len(blocks), device=blocks.device)).nonzero()[:, 0]
    number = torch.zeros_like(blocks).index_put((found,), torch.arange(len(found), device=blocks.device))
    return found, number[blocks]


class Moments(NamedTuple):
    """What :func:`moments` finds.

    Attributes:
        mean: of each 2 x 2 block and of each 4 x 4 block, two of [R, C].
        at: representatives of these blocks, two of int64 [R].
        error: squared distance of each location from the average of its 2 x 2 block, mean over channels; and of each
            block its locations' sum of the same from its own average, at its representative; [3, F].
        density: the visual density of each block, at its representative, [3, F]; that of a location is 0.
    """

    mean: tuple[Tensor, Tensor]
    at: tuple[Tensor, Tensor]
    error: Tensor
    density: Tensor


def moments(x: Tensor, blocks: Tensor) -> Moments:
    """Averages and variances of all blocks; those of 4 x 4 from those of 2 x 2, so that x is read twice.

    Args:
        x: [F, C], fp32 or fp64. blocks: what :func:`representatives` returned, on the device of x.
    """
    small, at = numbered(blocks[1])
    large, up = numbered(blocks[2])
    up = up[small]
    count = x.new_zeros(len(small)).index_add(0, at, x.new_ones(len(x)))
    total = x.new_zeros(len(small), x.shape[1]).index_add(0, at, x)
    counts = x.new_zeros(len(large)).index_add(0, up, count)
    wide = x.new_zeros(len(large), x.shape[1]).index_add(0, up, total) / counts[:, None]
    mean = total / count[:, None]
    error, density = x.new_zeros(3, len(x)), x.new_zeros(3, len(x))
    error[0] = (x - mean[at]).square_().mean(1)
    inside = x.new_zeros(len(small)).index_add(0, at, error[0])
    across = inside + count * (mean - wide[up]).square_().mean(1)
    error[1, small], error[2, large] = inside, x.new_zeros(len(large)).index_add(0, up, across)
    density[1, small], density[2, large] = inside / count, error[2, large] / counts
    return Moments((mean, wide), (small, large), error, density)


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
    blocks, device = representatives(lengths, grid).to(member.device), member.device
    values, place = priority.nan_to_num(0.0), blocks[0]
    (small, of_small), (large, of_large) = numbered(blocks[1]), numbered(blocks[2])
    image = torch.arange(len(lengths), device="cpu").repeat_interleave(lengths).to(device)

    part = (blocks[1] == place) & ~member  # these belong to 4 x 4 blocks, other locations to 2 x 2 blocks
    whole = torch.zeros(len(large), dtype=torch.bool, device=device).index_fill(0, of_large[part], True)
    parent, own = of_large[small], torch.cat([values[2, large], values[1, small]])
    first = own.argsort(descending=True, stable=True)  # ties in the order that they stand in
    turn = torch.empty_like(first).index_put_((first,), torch.arange(len(first), device=device))
    waits = whole[parent] & (~member[small] | (blocks[2, small] == small))
    waits &= values[1, small] > values[2, large][parent]  # once it is there, it is the next
    turn = 2 * torch.cat([turn[: len(large)], torch.where(waits, turn[parent], turn[len(large) :])])
    turn[len(large) :] += waits
    turn += 2 * len(turn) * image[torch.cat([large, small])]
    first = first[turn[first].argsort(stable=True)]
    turn = torch.empty_like(first).index_put_((first,), torch.arange(len(first), device=device))

    left = (~member).nonzero()[:, 0]
    left = left[torch.where(part, values[1], values[0])[left].argsort(descending=True, stable=True)]
    left = left[turn[torch.where(part, of_large, len(large) + of_small)[left]].argsort(stable=True)]
    missing = torch.zeros(len(lengths), dtype=torch.int64, device=device).index_add(0, image, (~member).long())
    rank = torch.arange(len(left), device=device) - (missing.cumsum(0) - missing)[image[left]]
    added = rank < torch.tensor(list(more), dtype=torch.int64, device=device)[image[left]]
    return torch.zeros_like(member).index_put_((left,), added)


define(
    "region_owner(Tensor member, Tensor lengths, Tensor grid) -> Tensor",
    region_owner,
    lambda member, *_: member.new_empty(2, member.shape[0], dtype=torch.int64),
    kernel="vlmrewrite.passes.dape.kernels.regions:region_owner",
)
