"""How many tokens of which kind a call has, image by image and frame by frame: what the host knows before it runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from itertools import accumulate, groupby, pairwise
from typing import TypeVar, cast

from vlmrewrite.plan.budget import tokens_kept
from vlmrewrite.plan.substitution import selections
from vlmrewrite.plan.tokens import (
    All,
    Frame,
    Image,
    Images,
    Last,
    Pair,
    Selection,
    TokenSet,
    Video,
    Videos,
    Vision,
    contains,
    has_text,
)

PER = ("frame", "image", "row")
"""What tokens are grouped by, the finest first. An image is one frame; ``"image"`` is an image or a whole video."""


T = TypeVar("T")


def _known(method: Callable[..., T]) -> Callable[..., T]:
    """A method of counts, computed once for each token set: a plan asks for the same one at every layer."""

    @wraps(method)
    def once(self: TokenCounts, s: TokenSet, *per: str) -> T:
        key = method, s, *per
        if key not in self._told:
            self._told[key] = method(self, s, *per)
        return cast(T, self._told[key])

    return once


def describe(counts: TokenCounts) -> str:
    """A call in one line."""
    rows, videos = len(counts.text), sum(counts.videos)
    many = {"row": rows, "image": len(counts.images) - videos, "video": videos}
    row, *seen = (f"{n} {what}{'s' * (n != 1)}" for what, n in many.items() if n or what != "video")
    return f"{row} of {counts.length} tokens, {', '.join(seen)}, {sum(counts.images)} vision tokens" + (
        ", padded" if counts.padded else ""
    )


@dataclass(frozen=True)
class TokenCounts:
    """What the host knows of one call before it runs: int only, no tensors.

    Args:
        length: T, tokens of the logical sequence that this call adds.
        text: text tokens of each row.
        images: vision tokens of each image, or video, rows in order.
        rows: the row of each image.
        ordinals: number of each image, or video, among those of its row.
        padded: whether any row has padding.
        overlap: whether a row's last prompt token is a vision token, and so counts as text too.
        videos: whether each of ``images`` is a video; empty: none is.
        frames: tokens of each frame of each image; empty: each image is one frame.
    """

    length: int
    text: tuple[int, ...]
    images: tuple[int, ...]
    rows: tuple[int, ...]
    ordinals: tuple[int, ...]
    padded: bool
    overlap: bool = False
    videos: tuple[bool, ...] = ()
    frames: tuple[tuple[int, ...], ...] = ()

    @cached_property
    def _told(self) -> dict[tuple[object, ...], object]:
        return {}

    @cached_property
    def each(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each frame of each image."""
        return self.frames or tuple((n,) for n in self.images)

    @cached_property
    def are_videos(self) -> tuple[bool, ...]:
        """Whether each image is a video."""
        return self.videos or (False,) * len(self.images)

    @cached_property
    def _members(self) -> dict[str, list[int]]:
        """How many frames each frame, image and row with an image has."""
        each = [len(image) for image in self.each]
        of_rows = [sum(n for _, n in group) for _, group in groupby(zip(self.rows, each, strict=True), lambda x: x[0])]
        return {"frame": [1] * sum(each), "image": each, "row": of_rows}

    def _summed(self, frames: Sequence[int], per: str) -> tuple[int, ...]:
        """A number of each frame, added up."""
        ends = [0, *accumulate(self._members[per])]
        return tuple(sum(frames[a:b]) for a, b in pairwise(ends))

    def sizes(self, per: str) -> tuple[int, ...]:
        """Vision tokens of each frame, image or row with an image."""
        return self._summed([n for image in self.each for n in image], per)

    def numbers(self, per: str) -> tuple[int, ...]:
        """Number of each frame, image or row among those of its row."""
        if per == "image":
            return self.ordinals
        of_rows = self._members["row"]
        return tuple(i for n in of_rows for i in range(n)) if per == "frame" else (0,) * len(of_rows)

    def frames_of(self, per: str) -> list[int]:
        """How many frames each frame, image or row with an image has."""
        return self._members[per]

    @_known
    def per_group(self, s: TokenSet, per: str) -> tuple[tuple[int, ...], bool]:
        """Members among each group's tokens, see :data:`PER`, and whether that is exact or an upper bound."""
        s, sizes = s.vision_part(), self.sizes(per)
        if isinstance(s, Selection):
            return self._selected(s, per)
        if not isinstance(s, Pair):
            return self._summed([n if self._holds(s, *at) else 0 for n, at in self._places], per), True
        level = max([per if per == "frame" else "image", *(x.per for x in selections(s))], key=PER.index)
        if PER.index(level) < PER.index(per):
            finer, exact = self.per_group(s, level)
            return self._coarser(finer, level, per), exact
        (a, exact_a), (b, exact_b) = self.per_group(s.left, per), self.per_group(s.right, per)
        if s.symbol == "|":
            both = tuple(min(x + y, n) for x, y, n in zip(a, b, sizes, strict=True))
            return both, exact_a and exact_b and not (any(a) and any(b))
        if s.symbol == "&":
            return tuple(map(min, a, b)), not (any(a) and any(b))
        if exact_a and exact_b and contains(s.left, s.right):
            return tuple(map(operator.sub, a, b)), True
        return a, exact_a and not any(b)

    @cached_property
    def _places(self) -> list[tuple[int, tuple[bool, int, int]]]:
        """Of each frame: its tokens; whether it is a video's, the number of its image in the row, and its own there."""
        images = zip(self.each, self.are_videos, self.ordinals, strict=True)
        return [(n, (video, k, i)) for sizes, video, k in images for i, n in enumerate(sizes)]

    @staticmethod
    def _holds(s: TokenSet, video: bool, number: int, frame: int) -> bool:
        if s in (Images, Videos):
            return video == (s == Videos)
        if isinstance(s, Image):
            return not video and number == s.index
        if isinstance(s, Video):
            return video and number == s.index
        return s == Vision or (isinstance(s, Frame) and video and frame == s.index)

    def _coarser(self, counts: Sequence[int], finer: str, per: str) -> tuple[int, ...]:
        """Numbers of finer groups, added up."""
        firsts = [0, *accumulate(self._members[finer])][:-1]
        spread = [0] * sum(self._members["image"])
        for at, n in zip(firsts, counts, strict=True):
            spread[at] += n
        return self._summed(spread, per)

    def _selected(self, s: Selection, per: str) -> tuple[tuple[int, ...], bool]:
        left, exact = self.per_group(s.source, s.per)
        kept = tuple(min(m, tokens_kept(s.keep, n)) for m, n in zip(left, self.sizes(s.per), strict=True))
        if PER.index(s.per) <= PER.index(per):
            return self._coarser(kept, s.per, per), exact
        inner, exact_inner = self.per_group(s.source, per)
        parents = [i for i, n in enumerate(self._members[s.per]) for _ in range(n)]
        firsts = [0, *accumulate(self._members[per])][:-1]
        bound = tuple(min(n, kept[parents[at]]) for n, at in zip(inner, firsts, strict=True))
        return bound, exact and exact_inner and (kept == left or len(bound) == len(kept))

    def per_image(self, s: TokenSet) -> tuple[tuple[int, ...], bool]:
        """Members among each image's tokens, and whether that is exact or an upper bound."""
        return self.per_group(s, "image")

    @_known
    def per_row(self, s: TokenSet) -> tuple[tuple[int, ...], bool]:
        """Members in each row, and whether that is exact or an upper bound."""
        if s in (Last, All):
            return (1 if s == Last else self.length,) * len(self.text), True
        (groups, exact), with_text = self.per_group(s, "row"), has_text(s)
        rows = list(self.text) if with_text else [0] * len(self.text)
        for (row, _), n in zip(groupby(self.rows), groups, strict=True):
            rows[row] += n
        return tuple(min(n, self.length) for n in rows), exact and not (self.overlap and with_text and any(groups))

    def size(self, s: TokenSet) -> int:
        """n: length of the set's index, the same for all rows."""
        return max(self.per_row(s)[0])

    def dense(self, s: TokenSet) -> bool:
        """Whether the index holds nothing but members in every row."""
        rows, exact = self.per_row(s)
        return exact and len(set(rows)) == 1 and not (s == All and self.padded)
