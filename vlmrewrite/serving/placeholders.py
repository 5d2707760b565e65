"""Placeholders and positions of prompts from which vision tokens are left out before an engine encodes the images.

An engine wants to know a prompt's tokens before it knows which features of an image will stay. So the prompt holds as
many placeholders as will stay, a *table* holds positions for them, and the features bring along, in further columns,
where in the image they stood. All of it is arithmetic on lists and small tensors; no engine is known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor

_BASE, _DIGITS = 128, 3
"""Coordinates travel as digits, which all dtypes of embeddings hold exactly (bfloat16: up to 256)."""

_TEXT, _OTHER = -1, -2
"""Of slots in a table that hold no token of an image: text, and embeddings that nothing is left out of."""


@dataclass(frozen=True)
class Layout:
    """What an image becomes in a prompt in which nothing is left out.

    Attributes:
        content: its tokens: placeholders of features, and what stands between and around them.
        pieces: first place and length in ``content`` of each run of placeholders, or of each tile of it: what a budget
            is of.
        earlier: how many images, or pieces of images, of the prompt come before it.
    """

    content: tuple[int, ...]
    pieces: tuple[tuple[int, int], ...]
    earlier: int = 0

    @classmethod
    def of(cls, content: Sequence[int], mask: Tensor | None, tile: int | None = None) -> Self:
        """The layout of some tokens.

        Args:
            content: the tokens.
            mask: which of them are placeholders, bool [len(content)]; None: all.
            tile: features of a tile, where a budget is of each tile; None: of each run of placeholders.
        """
        whole = torch.ones(len(content), dtype=torch.bool) if mask is None else mask.bool().cpu()
        if len(whole) != len(content):
            raise ValueError(f"expected a mask of the {len(content)} tokens that an image becomes, got {len(whole)}")
        edges = torch.diff(whole.int(), prepend=torch.zeros(1).int(), append=torch.zeros(1).int())
        starts, ends = (edges == 1).nonzero()[:, 0].tolist(), (edges == -1).nonzero()[:, 0].tolist()
        pieces = list[tuple[int, int]]()
        for start, end in zip(starts, ends, strict=True):
            size = end - start if tile is None or (end - start) % tile else tile
            pieces += [(at, size) for at in range(start, end, size)]
        return cls(tuple(content), tuple(pieces))

    @property
    def starts(self) -> list[int]:
        """Where the pieces begin in ``content``."""
        return [start for start, _ in self.pieces]

    @property
    def lengths(self) -> list[int]:
        """How many features the pieces have."""
        return [n for _, n in self.pieces]

    @property
    def places(self) -> Tensor:
        """Where each feature stands in ``content``, int64 [N], on the CPU."""
        ranges = [torch.arange(start, start + n, device="cpu") for start, n in self.pieces]
        return torch.cat([*ranges, torch.empty(0, dtype=torch.int64, device="cpu")])

    @property
    def mask(self) -> Tensor:
        """Which tokens are placeholders, bool [len(content)], on the CPU."""
        found = torch.zeros(len(self.content), dtype=torch.bool, device="cpu")
        found[self.places] = True
        return found

    def shrunk(self, counts: Sequence[int]) -> tuple[list[int], Tensor]:
        """The tokens with only so many placeholders of each piece, and which of them are placeholders, bool."""
        stays = ~self.mask
        for (start, n), k in zip(self.pieces, counts, strict=True):
            if not 1 <= k <= n:
                raise ValueError(f"expected to keep 1 to {n} of {n} tokens of an image, got {k}")
            stays[start : start + k] = True
        return [t for t, here in zip(self.content, stays.tolist(), strict=True) if here], self.mask[stays]

    def behind(self, earlier: int) -> Self:
        """The same, behind so many images or pieces."""
        return replace(self, earlier=earlier)

    def to_tensor(self) -> Tensor:
        """Numbers from which :meth:`from_tensor` makes an equal layout, int64 [1 + 1 + 2P + len(content)]."""
        flat = [x for piece in self.pieces for x in piece]
        return torch.tensor([self.earlier, len(self.pieces), *flat, *self.content], dtype=torch.int64, device="cpu")

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> Self:
        """The layout that :meth:`to_tensor` wrote."""
        earlier, n, *rest = numbers.tolist()
        pieces = tuple(zip(rest[: 2 * n : 2], rest[1 : 2 * n : 2], strict=True))
        return cls(tuple(rest[2 * n :]), pieces, earlier)


class Span(NamedTuple):
    """What stands for an image, video or sound in a prompt.

    Attributes:
        offset: of its first token.
        length: how many tokens it has.
        mask: which of them are placeholders, bool [length]; None: all.
        layout: of an image from which features are left out; None: of anything else.
    """

    offset: int
    length: int
    mask: Tensor | None
    layout: Layout | None

    @property
    def slots(self) -> Tensor:
        """Where its placeholders stand in the prompt, int64, on the CPU."""
        whole = torch.arange(self.offset, self.offset + self.length, device="cpu")
        return whole if self.mask is None else whole[self.mask.cpu()]


class Original(NamedTuple):
    """A prompt with all placeholders.

    Attributes:
        tokens: its ids.
        spans: of the images, videos and sounds, in the order in which they were given.
        places: where each token of the prompt with fewer placeholders stands in it; of an image's, where its first
            feature stands. int64 [P].
        kind: of the same tokens: 0 an image with a layout, else ``-1`` text and ``-2`` other placeholders. int64 [P].
    """

    tokens: list[int]
    spans: list[Span]
    places: Tensor
    kind: Tensor


def original(tokens: Sequence[int], spans: Sequence[Span]) -> Original:
    """The prompt in which nothing is left out.

    Args:
        tokens: ids of the prompt with fewer placeholders.
        spans: of its images, videos and sounds; those with a layout do not overlap others.

    Raises:
        ValueError: a span does not fit its layout.
    """
    kind = torch.full((len(tokens),), _TEXT, dtype=torch.int64, device="cpu")
    index = torch.arange(len(tokens), dtype=torch.int64, device="cpu")
    whole, found, at, more = list[int](), dict[int, Span](), 0, 0
    for i in sorted(range(len(spans)), key=lambda i: spans[i].offset):
        offset, length, mask, layout = spans[i]
        if layout is None:
            kind[spans[i].slots] = _OTHER
            found[i] = Span(offset + more, length, mask, None)
            continue
        slots, places = spans[i].slots, layout.places
        lead, size = int(places[0]), int(places[-1] - places[0]) + 1  # what is around may be shared by two images
        offset, length = int(slots[0]), int(slots[-1] - slots[0]) + 1
        start, others = offset + more, (~layout.mask[lead : lead + size]).nonzero()[:, 0]
        if len(others) != length - len(slots) or offset < at:
            raise ValueError(f"{len(slots)} placeholders at {offset} do not stand for an image of {len(places)}")
        whole += [*tokens[at:offset], *layout.content[lead : lead + size]]
        kind[slots] = 0
        inside = slice(offset, offset + length)
        index[inside][kind[inside] != 0] = others + start
        index[slots] = start
        found[i] = Span(start - lead, len(layout.content), layout.mask, layout)
        at, more = offset + length, more + size - length
        index[at:] = torch.arange(at, len(tokens), device="cpu") + more
    return Original([*whole, *tokens[at:]], [found[i] for i in range(len(spans))], index, kind)


def table_of(prompt: Original, positions: Tensor, following: int) -> Tensor:
    """Positions of the tokens of a prompt with fewer placeholders, as far as they are known, and what makes them known.

    Args:
        prompt: the prompt in which nothing is left out.
        positions: of its tokens, int64 [A, T], A axes.
        following: the position of the first token behind it.

    Returns:
        int64 [2A + 1, P]: positions; where the image begins, of an image's slots, and of others a negative number in
        the first of these rows; ``following``. What stands in the first A rows for an image's slots is where it begins.
    """
    now, image = positions[:, prompt.places], prompt.kind == 0
    begin = torch.where(image, now, prompt.kind)
    return torch.cat([now, begin, torch.full_like(now[:1], following)]).contiguous()


def rows_of(axes: int) -> int:
    """Rows of a table of positions with so many axes."""
    return 2 * axes + 1


def with_columns(features: Tensor, relative: Tensor) -> Tensor:
    """Features, [k, C], with what their places relative to the image's first feature, int64 [A, k], are made of."""
    if relative.numel() and not 0 <= int(relative.min()) <= int(relative.max()) < _BASE**_DIGITS:
        most, got = _BASE**_DIGITS - 1, f"{int(relative.min())} to {int(relative.max())}"
        raise ValueError(f"expected places of features from 0 to {most}, got {got}")
    digits = [relative // _BASE**i % _BASE for i in range(_DIGITS)]
    return torch.cat([features, torch.cat(digits).T.to(features)], 1)


def resolved(table: Tensor, embeddings: Sequence[Tensor], computed: int) -> tuple[list[Tensor], Tensor, int]:
    """The table with the positions of features that are there now, which may be all of a prompt or some.

    Done again with the same features it gives the same.

    Args:
        table: of :func:`table_of`, [2A + 1, P].
        embeddings: of consecutive placeholders from the first one at or behind ``computed``, each [n, C], one for each
            image, video or sound; of images with columns of :func:`with_columns`.
        computed: how many tokens of the prompt are behind the engine.

    Returns:
        The features without the columns; the new table; what to add to the number of tokens for the next position.

    Raises:
        ValueError: there are more embeddings than placeholders.
    """
    axes, made, clean = len(table) // 2, table, list[Tensor]()
    if embeddings:
        made = table.clone()
        slots, sizes = (table[axes, computed:] != _TEXT).nonzero()[:, 0] + computed, [len(x) for x in embeddings]
        if (given := sum(sizes)) > len(slots):
            raise ValueError(f"expected embeddings of at most {len(slots)} placeholders, got {given}")
        for rows, here in zip(embeddings, slots[:given].split(sizes), strict=True):
            if int(table[axes, here[0]]) == _OTHER:
                clean.append(rows)
                continue
            digits = rows[:, -axes * _DIGITS :].round().to(table).T.reshape(_DIGITS, axes, len(rows))
            powers = torch.tensor([_BASE**i for i in range(_DIGITS)]).to(table)
            made[:axes, here] = made[axes : 2 * axes, here] + (digits * powers[:, None, None]).sum(0)
            clean.append(rows[:, : -axes * _DIGITS])
    return clean, made, int(made[2 * axes, 0]) - made.shape[1]
