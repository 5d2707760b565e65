"""Counting a plan's tokens on the host, before a call runs."""

from __future__ import annotations

from dataclasses import dataclass

from vlmrewrite.plan.budget import tokens_kept
from vlmrewrite.plan.tokens import (
    All,
    Image,
    Intersection,
    Last,
    Nothing,
    Pair,
    Selection,
    TokenSet,
    Union,
    Vision,
    contains,
    has_text,
    vision_part,
)


def describe(counts: TokenCounts) -> str:
    """A call in one line."""
    rows, images = len(counts.text), len(counts.images)
    return (
        f"{rows} row{'s' * (rows != 1)} of {counts.length} tokens, {images} image{'s' * (images != 1)},"
        f" {sum(counts.images)} vision tokens" + (", padded" if counts.padded else "")
    )


@dataclass(frozen=True)
class TokenCounts:
    """What the host knows of one call before it runs: int only, no tensors.

    Args:
        length: T, tokens of the logical sequence that this call adds.
        text: text tokens of each row.
        images: vision tokens of each image, rows in order.
        rows: the row of each image.
        ordinals: number of each image within its row.
        padded: whether any row has padding.
        overlap: whether a row's last prompt token is a vision token, and so counts as text too.
    """

    length: int
    text: tuple[int, ...]
    images: tuple[int, ...]
    rows: tuple[int, ...]
    ordinals: tuple[int, ...]
    padded: bool
    overlap: bool = False

    def per_image(self, s: TokenSet) -> tuple[tuple[int, ...], bool]:
        """Members among each image's tokens, and whether that is exact or an upper bound."""
        s = vision_part(s)
        if s == Vision:
            return self.images, True
        if s == Nothing:
            return tuple(0 for _ in self.images), True
        if isinstance(s, Image):
            return tuple(n if o == s.index else 0 for n, o in zip(self.images, self.ordinals, strict=True)), True
        if isinstance(s, Selection):
            left, exact = self.per_image(s.source)
            kept = tuple(min(m, tokens_kept(s.keep, n)) for m, n in zip(left, self.images, strict=True))
            return kept, exact
        assert isinstance(s, Pair)
        (a, exact_a), (b, exact_b) = self.per_image(s.left), self.per_image(s.right)
        if isinstance(s, Union):
            apart = not any(a) or not any(b)
            both = tuple(min(x + y, n) for x, y, n in zip(a, b, self.images, strict=True))
            return both, apart and exact_a and exact_b
        if isinstance(s, Intersection):
            return tuple(min(x, y) for x, y in zip(a, b, strict=True)), not any(a) or not any(b)
        if exact_a and exact_b and contains(s.left, s.right):
            return tuple(x - y for x, y in zip(a, b, strict=True)), True
        return a, exact_a and not any(b)

    def per_row(self, s: TokenSet) -> tuple[tuple[int, ...], bool]:
        """Members in each row, and whether that is exact or an upper bound."""
        if s == Last:
            return tuple(1 for _ in self.text), True
        if s == All:
            return tuple(self.length for _ in self.text), True
        images, exact = self.per_image(s)
        exact = exact and not (self.overlap and has_text(s) and any(images))
        rows = list(self.text) if has_text(s) else [0] * len(self.text)
        for row, n in zip(self.rows, images, strict=True):
            rows[row] += n
        return tuple(min(n, self.length) for n in rows), exact

    def size(self, s: TokenSet) -> int:
        """n: length of the set's index, the same for all rows."""
        return max(self.per_row(s)[0])

    def dense(self, s: TokenSet) -> bool:
        """Whether the index holds nothing but members in every row."""
        rows, exact = self.per_row(s)
        return exact and len(set(rows)) == 1 and not (s == All and self.padded)
