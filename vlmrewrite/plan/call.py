"""One call of a rewritten model as the host sees it: which tokens are what, image by image, and how many."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmrewrite.plan.budget import tokens_kept
from vlmrewrite.plan.tokens import All, Image, Last, Pair, Selection, Text, TokenSet, Vision, contains, has_text


def _on_host(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device="cpu")


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
        s = s.vision_part()
        if isinstance(s, Selection):
            left, exact = self.per_image(s.source)
            return tuple(min(m, tokens_kept(s.keep, n)) for m, n in zip(left, self.images, strict=True)), exact
        if not isinstance(s, Pair):
            each = zip(self.images, self.ordinals, strict=True)
            return tuple(n if s in (Vision, Image(ordinal)) else 0 for n, ordinal in each), True
        (a, exact_a), (b, exact_b) = self.per_image(s.left), self.per_image(s.right)
        if s.symbol == "|":
            both = tuple(min(x + y, n) for x, y, n in zip(a, b, self.images, strict=True))
            return both, exact_a and exact_b and not (any(a) and any(b))
        if s.symbol == "&":
            return tuple(map(min, a, b)), not (any(a) and any(b))
        if exact_a and exact_b and contains(s.left, s.right):
            return tuple(map(operator.sub, a, b)), True
        return a, exact_a and not any(b)

    def per_row(self, s: TokenSet) -> tuple[tuple[int, ...], bool]:
        """Members in each row, and whether that is exact or an upper bound."""
        if s in (Last, All):
            return (1 if s == Last else self.length,) * len(self.text), True
        (images, exact), with_text = self.per_image(s), has_text(s)
        rows = list(self.text) if with_text else [0] * len(self.text)
        for row, n in zip(self.rows, images, strict=True):
            rows[row] += n
        return tuple(min(n, self.length) for n in rows), exact and not (self.overlap and with_text and any(images))

    def size(self, s: TokenSet) -> int:
        """n: length of the set's index, the same for all rows."""
        return max(self.per_row(s)[0])

    def dense(self, s: TokenSet) -> bool:
        """Whether the index holds nothing but members in every row."""
        rows, exact = self.per_row(s)
        return exact and len(set(rows)) == 1 and not (s == All and self.padded)


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
        """The counts; an image is an entry of the tower's output, cut where other tokens stand in between."""
        flat = self.flat.cpu()
        entry = _on_host(range(len(self.feature_lengths))).repeat_interleave(_on_host(self.feature_lengths))
        cut = (flat[1:] != flat[:-1] + 1) | (entry[1:] != entry[:-1]) | (flat[1:] % self.length == 0)
        images = [image for image in flat.tensor_split(cut.nonzero()[:, 0] + 1) if len(image)]
        rows = [int(image[0]) // self.length for image in images]
        *text, overlap = torch.cat([self.text.sum(1), (self.vision & self.text).any()[None]]).tolist()  # at once
        return TokenCounts(
            length=self.length,
            text=tuple(text),
            images=tuple(map(len, images)),
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
        if isinstance(s, (Selection, Image)):
            which = chosen[s] if isinstance(s, Selection) else self.image_of_token == s.index
            return torch.zeros_like(self.vision).masked_scatter(self.vision, which)
        if s == Last:
            return torch.zeros_like(self.vision).scatter(1, self.last, self.last_valid)
        known: dict[TokenSet, Tensor] = {All: self.everywhere_valid, Text: self.text, Vision: self.vision}
        return known.get(s, torch.zeros_like(self.vision))

    def fill(self, extra: Extra) -> Any:
        """The value of one additional graph input."""
        if extra.subject is None:
            return getattr(self, extra.kind)
        if extra.kind == "size":
            return max(1, self.counts.size(extra.subject))
        if extra.kind == "dense":
            return self.counts.dense(extra.subject)
        return _on_host(self.counts.per_image(extra.subject)[0])


class Extra(NamedTuple):
    """An input of the rewritten graph beyond the captured ones, filled in for each call by the host.

    ``kind`` is ``"size"`` or ``"dense"`` (of ``subject``, a token set), ``"keep"`` (of a selection), or the name of a
    field of :class:`vlmrewrite.plan.call.Call`.
    """

    kind: str
    subject: TokenSet | None = None
