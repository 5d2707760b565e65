"""One call of a rewritten model as the host sees it: which tokens are vision, text or padding, image by image."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlmrewrite.plan.budget import tokens_kept
from vlmrewrite.plan.counts import TokenCounts
from vlmrewrite.plan.tokens import All, Image, Last, Selection, Text, TokenSet, Vision, fold


def _on_host(numbers: Sequence[int]) -> Tensor:
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
        grid: rows and columns of each image's tokens, int64 [I, 2] on the CPU, or None; see :mod:`vlmrewrite.hf.grid`.
    """

    vision: Tensor
    padding: Tensor | None
    feature_lengths: list[int]
    past: int = 0
    prompt_end: Tensor | None = None
    encoder_features: Tensor | None = None
    grid: Tensor | None = None
    ends: Tensor | None = None

    def __post_init__(self) -> None:
        found, given = len(self.flat), sum(self.feature_lengths)
        if found != given:
            raise ValueError(f"image features and image tokens do not match: {found} image tokens, {given} features")
        self._segments = self._images()

    def _images(self) -> list[tuple[int, int]]:
        """(row, tokens) of each image: an entry of the tower's output, cut where other tokens stand in between."""
        flat = self.flat.cpu()
        entry = _on_host(range(len(self.feature_lengths))).repeat_interleave(_on_host(self.feature_lengths))
        if not len(flat):
            return []
        cut = (flat[1:] != flat[:-1] + 1) | (entry[1:] != entry[:-1]) | (flat[1:] % self.length == 0)
        starts = [0, *(cut.nonzero()[:, 0] + 1).tolist(), len(flat)]
        return [(int(flat[a]) // self.length, b - a) for a, b in pairwise(starts)]

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
        """The counts."""
        rows = [row for row, _ in self._segments]
        *text, overlap = torch.cat([self.text.sum(1), (self.vision & self.text).any()[None]]).tolist()  # at once
        return TokenCounts(
            length=self.length,
            text=tuple(text),
            images=tuple(n for _, n in self._segments),
            rows=tuple(rows),
            ordinals=tuple(rows[:i].count(row) for i, row in enumerate(rows)),
            padded=self.padding is not None,
            overlap=bool(overlap),
        )

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each image, int64 [I], on the CPU."""
        return _on_host(self.counts.images)

    @cached_property
    def ordinal(self) -> Tensor:
        """Number of each image within its row, int64 [I], on the CPU."""
        return _on_host(self.counts.ordinals)

    @cached_property
    def image_of_token(self) -> Tensor:
        """Number within its row of each vision token's image, int64 [F]."""
        return self.ordinal.repeat_interleave(self.lengths).to(self.vision.device)

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
        columns = self.everywhere
        return (columns if self.padding is None else columns * self.padding).amax(1, keepdim=True)

    @cached_property
    def last_valid(self) -> Tensor:
        """All True, bool [B, 1]."""
        return torch.ones_like(self.last, dtype=torch.bool)

    @cached_property
    def everywhere(self) -> Tensor:
        """Every column, int64 [B, T]."""
        columns = torch.arange(self.length, device=self.vision.device)
        return columns[None].expand(self.vision.shape[0], -1)

    @cached_property
    def everywhere_valid(self) -> Tensor:
        """All True, bool [B, T]."""
        return torch.ones_like(self.vision)

    def members(self, s: TokenSet, chosen: Mapping[Selection, Tensor]) -> Tensor:
        """A token set as bool [B, T], given what each selection in it chose (bool [F])."""

        def leaf(x: TokenSet) -> Tensor:
            if isinstance(x, (Selection, Image)):
                which = chosen[x] if isinstance(x, Selection) else self.image_of_token == x.index
                return torch.zeros_like(self.vision).masked_scatter(self.vision, which)
            if x == Last:
                return torch.zeros_like(self.vision).scatter(1, self.last, self.last_valid)
            known = {All: self.everywhere_valid, Text: self.text, Vision: self.vision}
            return known.get(x, torch.zeros_like(self.vision))

        members: Tensor = fold(s, leaf, operator.or_, operator.and_, lambda a, b: a & ~b)
        return members

    def fill(self, extra: Extra) -> Any:
        """The value of one additional graph input."""
        if extra.kind == "size":
            assert extra.subject is not None
            return max(1, self.counts.size(extra.subject))
        if extra.kind == "dense":
            assert extra.subject is not None
            return self.counts.dense(extra.subject)
        if extra.kind == "keep":
            assert isinstance(extra.subject, Selection)
            left, _ = self.counts.per_image(extra.subject)
            wanted = [tokens_kept(extra.subject.keep, n) for n in self.counts.images]
            return _on_host([min(a, b) for a, b in zip(left, wanted, strict=True)])
        return getattr(self, extra.kind)


@dataclass(frozen=True)
class Extra:
    """An input of the rewritten graph beyond the captured ones, filled in for each call by the host.

    ``kind`` is ``"size"`` or ``"dense"`` (of ``subject``, a token set), ``"keep"`` (of a selection), or the name of a
    field of :class:`vlmrewrite.plan.call.Call`.
    """

    kind: str
    subject: TokenSet | None = None
