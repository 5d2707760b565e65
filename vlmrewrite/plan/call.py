"""One call of a rewritten model as the host sees it: which tokens are what, image by image, and how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import compress, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmrewrite.plan.counts import TokenCounts
from vlmrewrite.plan.tokens import (
    All,
    Frame,
    Image,
    Images,
    Last,
    Pair,
    Selection,
    Text,
    TokenSet,
    Video,
    Videos,
    Vision,
)
from vlmrewrite.plan.vocabulary import Begin

GROUPED = ("lengths", "ordinal", "grid", "frames")
"""Facts that are of groups of tokens; see :data:`vlmrewrite.plan.counts.PER`."""


def _frames(tokens: np.ndarray, known: Sequence[int]) -> tuple[int, ...]:
    """Tokens of each frame of a video, whose tokens stand there in the sequence."""
    pieces = np.diff(np.flatnonzero(np.diff(tokens) != 1) + 1, prepend=0, append=len(tokens)).tolist()
    return tuple(filter(None, known)) if pieces == [sum(known)] else tuple(pieces)


@lru_cache(maxsize=128)
def _one(counts: TokenCounts) -> TokenCounts:
    """The same for equal counts, which remember how many tokens are in each set."""
    return counts


def _on_host(numbers: Sequence[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


@dataclass
class Call:
    """What the host knows of a call.

    Args:
        vision: the vision tokens, bool [B, T].
        padding: True for real tokens, bool [B, T], or None without padding.
        feature_lengths: tokens of each entry of the tower's output, in order.
        past: logical length of the cache before the call.
        prompt_end: column of each row's last prompt token, int64 [B], or None: the last real token.
        encoder_features: what the projector took, [F, C'], or None.
        grids: rows and columns of each frame's tokens, or None; see :mod:`vlmrewrite.hf.grid`.
        ends: rows whose last prompt token is in this call, bool [B], or None: all.
        videos: the vision tokens that are videos', bool [B, T], or None without a video.
        video_lengths: tokens of each video.
        video_frames: tokens of each frame of each video, where that is known; a video that text cuts has a frame in
            each piece.
        sizes: counts of the call that these are some rows of, by which the lengths of sets go; None: its own.
        follows: of a dispatch, the plan that all rows follow, whatever its chooser says; None: as the chooser says.
        begins: of a dispatch, the plan that it begins with where the chooser leaves that open; None: the first.
        picked: whether some of the tower's features do not stand there.
    """

    vision: Tensor
    padding: Tensor | None
    feature_lengths: list[int]
    past: int = 0
    prompt_end: Tensor | None = None
    encoder_features: Tensor | None = None
    grids: list[tuple[int, int]] | None = None
    ends: Tensor | None = None
    videos: Tensor | None = None
    video_lengths: Sequence[int] = ()
    video_frames: Sequence[Sequence[int]] | None = None
    sizes: TokenCounts | None = None
    follows: int | None = None
    begins: Begin | None = None
    picked: bool = False

    def __post_init__(self) -> None:
        video = 0 if self.videos is None else int(self.of_videos.sum())
        each = ("image", len(self.flat) - video, self.feature_lengths), ("video", video, self.video_lengths)
        for what, found, lengths in each:
            if found != sum(lengths):
                raise ValueError(
                    f"{what} features and {what} tokens do not match: {found} {what} tokens, {sum(lengths)} features"
                )

    @cached_property
    def of_videos(self) -> Tensor:
        """Which of the vision tokens are videos', bool [F]."""
        if self.videos is None:
            return torch.zeros_like(self.flat, dtype=torch.bool)
        return self.videos.flatten()[self.flat]

    @property
    def length(self) -> int:
        """T."""
        return self.vision.shape[1]

    @cached_property
    def flat(self) -> Tensor:
        """``row * T + column`` of each vision token, int64 [F]."""
        return self.vision.flatten().nonzero()[:, 0]

    @cached_property
    def text(self) -> Tensor:
        """Tokens that are neither vision nor padding, bool [B, T]; a last prompt token that is vision is among them."""
        text = ~self.vision if self.padding is None else ~self.vision & self.padding
        ends = self.last_valid if self.ends is None else self.ends[:, None]
        return text.scatter(1, self.last, text.gather(1, self.last) | ends)

    @cached_property
    def counts(self) -> TokenCounts:
        """The counts.

        An image is an entry of the tower's output, cut where other tokens stand in between. A video is a whole entry;
        where other tokens stand in between, there are frames between them, else it has as many as it is known to have.
        """
        flat = self.flat.cpu().numpy()
        of_videos = np.zeros(len(flat), bool) if self.videos is None else self.of_videos.cpu().numpy()
        entries, row_of = np.empty_like(flat), flat // self.length
        for which, given, first in ((~of_videos, self.feature_lengths, 0), (of_videos, self.video_lengths, len(flat))):
            entries[which] = np.arange(first, first + len(given)).repeat(np.array(given, int))
        ends_entry, gap = (entries[1:] != entries[:-1]) | (row_of[1:] != row_of[:-1]), flat[1:] - flat[:-1] != 1
        cuts = np.flatnonzero(ends_entry | (gap & ~of_videos[1:])) + 1
        images = list(pairwise([0, *cuts.tolist(), len(flat)])) if len(flat) else []
        firsts = [first for first, _ in images]
        rows, videos = row_of[firsts].tolist(), of_videos[firsts].tolist()
        known = iter(self.video_frames or ())
        frames = tuple(
            _frames(flat[a:b], next(known, ())) if video else (b - a,)
            for (a, b), video in zip(images, videos, strict=True)
        )
        *text, overlap = torch.cat([self.text.sum(1), (self.vision & self.text).any()[None]]).tolist()  # at once
        kinds = list(zip(rows, videos, strict=True))
        made = TokenCounts(
            length=self.length,
            text=tuple(text),
            images=tuple(b - a for a, b in images),
            rows=tuple(rows),
            ordinals=tuple(kinds[:i].count(kind) for i, kind in enumerate(kinds)),
            padded=self.padding is not None,
            overlap=bool(overlap),
            videos=tuple(videos) if any(videos) else (),
            frames=frames if any(videos) else (),
        )
        return _one(made)

    def fact(self, name: str, per: str = "image") -> Any:
        """A fact of the call by its name; of each frame, image or row, if it is one of groups."""
        counted = {"lengths": self.counts.sizes, "ordinal": self.counts.numbers, "frames": self.counts.frames_of}
        if name in counted:
            return _on_host(counted[name](per))
        return self.grid(per) if name == "grid" else getattr(self, name)

    def grid(self, per: str = "frame") -> Tensor | None:
        """Rows and columns of each group's tokens, int64 [I, 2] on the CPU, or None; frames stand below one another."""
        if self.grids is None:
            return None
        each, found = iter(self.grids), []
        for n in self.counts.frames_of(per):
            sizes = [next(each) for _ in range(n)]
            found.append((sum(h for h, _ in sizes), sizes[0][1]))
        return _on_host(found).reshape(-1, 2)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each image, int64 [I], on the CPU."""
        return _on_host(self.counts.images)

    @cached_property
    def ordinal(self) -> Tensor:
        """Number of each image, or video, within its row, int64 [I], on the CPU."""
        return _on_host(self.counts.ordinals)

    @cached_property
    def image_of_token(self) -> Tensor:
        """Number within its row of each vision token's image; below 0, -1 - number, of its video; int64 [F]."""
        of_token = self.ordinal.repeat_interleave(self.lengths).to(self.vision.device)
        return torch.where(self.of_videos, -1 - of_token, of_token)

    @cached_property
    def frame(self) -> Tensor:
        """Number of each vision token's frame within its video, 0 in an image; int64 [F]."""
        numbers = _on_host([i for image in self.counts.each for i in range(len(image))])
        return numbers.repeat_interleave(_on_host(self.counts.sizes("frame"))).to(self.vision.device)

    @cached_property
    def vision_tokens(self) -> Tensor:
        """All True, bool [F]."""
        return torch.ones_like(self.flat, dtype=torch.bool)

    @cached_property
    def with_images(self) -> Tensor:
        """Rows that have an image, bool [B]."""
        return self.vision.any(1)

    @cached_property
    def last(self) -> Tensor:
        """Column of each row's last prompt token, int64 [B, 1]."""
        if self.prompt_end is not None:
            return self.prompt_end[:, None]
        return (self.everywhere if self.padding is None else self.everywhere * self.padding).amax(1, keepdim=True)

    @cached_property
    def last_valid(self) -> Tensor:
        """All True, bool [B, 1]."""
        return torch.ones_like(self.last, dtype=torch.bool)

    @cached_property
    def everywhere(self) -> Tensor:
        """Every column, int64 [B, T]."""
        return torch.arange(self.length, device=self.vision.device)[None].expand(self.vision.shape[0], -1)

    @cached_property
    def everywhere_valid(self) -> Tensor:
        """All True, bool [B, T]."""
        return torch.ones_like(self.vision)

    def members(self, s: TokenSet, chosen: Mapping[Selection, Tensor]) -> Tensor:
        """A token set as bool [B, T], given what each selection in it chose (bool [F])."""
        if isinstance(s, Pair):
            left, right = self.members(s.left, chosen), self.members(s.right, chosen)
            return left | right if s.symbol == "|" else left & (~right if s.symbol == "-" else right)
        if isinstance(s, (Selection, Image, Video, Frame)) or s in (Images, Videos):
            which = chosen[s] if isinstance(s, Selection) else self._which(s)
            return torch.zeros_like(self.vision).masked_scatter(self.vision, which)
        if s == Last:
            return torch.zeros_like(self.vision).scatter(1, self.last, self.last_valid)
        known: dict[TokenSet, Tensor] = {All: self.everywhere_valid, Text: self.text, Vision: self.vision}
        return known.get(s, torch.zeros_like(self.vision))

    def _which(self, s: TokenSet) -> Tensor:
        """The tokens of some images, bool [F]."""
        if isinstance(s, Image):
            return self.image_of_token == s.index
        if isinstance(s, Video):
            return self.image_of_token == -1 - s.index
        return (self.frame == s.index) & self.of_videos if isinstance(s, Frame) else self.of_videos == (s == Videos)

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Which vision tokens are of some rows, int64 [b]: bool [F]."""
        return torch.zeros_like(self.with_images).index_fill(0, rows, True)[self.flat // self.length]

    def of_rows(self, rows: Tensor) -> Call:
        """The same of some rows, int64 [b], ascending; sets are as long as they are in this call."""

        def left(lengths: Sequence[int], of: Tensor) -> list[int]:
            return [int(entry.sum()) for entry in which[of].cpu().split(list(lengths))]

        which, features, counts = self.tokens_of(rows), self.encoder_features, self.counts
        videos, kept = left(self.video_lengths, self.of_videos), set(rows.tolist())
        frames = [row in kept for row, image in zip(counts.rows, counts.each, strict=True) for _ in image]
        own = {name: getattr(self, name) for name in ("vision", "padding", "prompt_end", "ends", "videos")}
        own = {name: x[rows] for name, x in own.items() if x is not None}
        return replace(
            self,
            **own,
            feature_lengths=[n for n in left(self.feature_lengths, ~self.of_videos) if n],
            encoder_features=None if features is None else features[which],
            grids=None if self.grids is None else list(compress(self.grids, frames)),
            video_lengths=[n for n in videos if n],
            video_frames=None if self.video_frames is None else list(compress(self.video_frames, videos)),
            sizes=self.sizes or counts,
        )

    def fill(self, extra: Extra) -> Any:
        """The value of one additional graph input."""
        counts = self.sizes or self.counts
        if extra.subject is None:
            return self.fact(extra.kind, extra.per)
        if extra.kind == "size":
            return max(1, counts.size(extra.subject))
        if extra.kind == "dense":
            return counts.dense(extra.subject)
        return _on_host(self.counts.per_group(extra.subject, extra.per)[0])


class Extra(NamedTuple):
    """An input of the rewritten graph beyond the captured ones, filled in for each call by the host.

    ``kind`` is ``"size"`` or ``"dense"`` (of ``subject``, a token set), ``"keep"`` (of a selection), or the name of a
    fact of the :class:`vlmrewrite.plan.call.Call`; ``per`` is what the fact, or the selection, goes by.
    """

    kind: str
    subject: TokenSet | None = None
    per: str = "image"
