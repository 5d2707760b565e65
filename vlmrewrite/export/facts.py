"""What a rewritten graph is given beside its captured inputs, made by tensor operations alone, so that it is traced.

Of an exported prompt the images are fixed, and with them every number that the host otherwise counts anew in each call.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vlmrewrite.plan import GROUPED, All, Call, Extra, Last, Nothing, TokenCounts, TokenSet


@dataclass(frozen=True)
class FixedCounts(TokenCounts):
    """Counts of a call with the images of an example, and texts of any length.

    Args:
        tokens: T, which may be symbolic.
        masked: whether the call has an attention mask, so that any text may be padding.
    """

    tokens: Any = 0
    masked: bool = False

    @classmethod
    def of(cls, counts: TokenCounts, tokens: Any, masked: bool) -> FixedCounts:
        """Those of a call like one that was counted."""
        own = {field.name: getattr(counts, field.name) for field in fields(counts)}
        return cls(**own | {"tokens": tokens, "masked": masked})

    def _by_row(self, s: TokenSet) -> list[tuple[int, int]]:
        """Vision tokens of each row, and how many of them are in a set, or may be."""
        found = [(0, 0)] * len(self.text)
        each = zip(self.sizes("row"), self.per_group(s, "row")[0], strict=True)
        for (row, _), numbers in zip(groupby(self.rows), each, strict=True):
            found[row] = numbers
        return found

    def size(self, s: TokenSet) -> Any:
        """Length of the set's index: with text, all tokens but the vision tokens that every row drops."""
        if s in (All, Last):
            return self.tokens if s == All else 1
        rows = self._by_row(s)
        if s.text_part() == Nothing:
            return max(n for _, n in rows)
        dropped = min(vision - n for vision, n in rows)
        return self.tokens - max(0, dropped - self.overlap)

    def dense(self, s: TokenSet) -> bool:
        """Whether the index holds nothing but members in every row, whatever the texts."""
        if s in (All, Last):
            return s == Last or not self.masked
        text = s.text_part() != Nothing
        rows = {vision - n if text else n for vision, n in self._by_row(s)}
        return self.per_group(s, "row")[1] and len(rows) == 1 and not (text and (self.masked or self.overlap))


def listed(example: Call, extras: Iterable[Extra]) -> dict[Extra, list[Any]]:
    """Of a rewritten graph's inputs those whose numbers only the images decide, with these."""
    known = ((extra, example.fill(extra)) for extra in extras if extra.kind in (*GROUPED, "keep"))
    return {extra: x.tolist() for extra, x in known if x is not None}


@dataclass
class FixedCall(Call):
    """A call with the images of an example, and texts of any length.

    Args:
        example: the call that was captured.
        listed: the inputs of a graph whose numbers only the images decide, and these; see :func:`listed`.
    """

    example: Call | None = None
    listed: Mapping[Extra, list[Any]] = field(default_factory=dict)

    @cached_property
    def flat(self) -> Tensor:
        """``row * T + column`` of each vision token, int64 [F]."""
        upto = self.vision.flatten().cumsum(0)
        every = torch.arange(1, sum(self._counted.images) + 1, device=self.vision.device)
        return torch.searchsorted(upto, every)

    @property
    def _counted(self) -> TokenCounts:
        assert self.example is not None
        return self.example.counts

    @cached_property
    def counts(self) -> TokenCounts:
        """The counts, as far as they are those of the images."""
        return FixedCounts.of(self._counted, self.length, self.padding is not None)

    @cached_property
    def image_of_token(self) -> Tensor:
        """As of :class:`Call`, int64 [F]."""
        counts = self._counted
        each = zip(counts.ordinals, counts.are_videos, strict=True)
        return self._spread([-1 - i if video else i for i, video in each], counts.images)

    @cached_property
    def frame(self) -> Tensor:
        """As of :class:`Call`, int64 [F]."""
        counts = self._counted
        return self._spread([i for image in counts.each for i in range(len(image))], counts.sizes("frame"))

    def fill(self, extra: Extra) -> Any:
        """As of :class:`Call`; numbers that only the images decide can be listed, even while they are traced."""
        x = super().fill(extra)
        if extra in self.listed:
            x.tolist = functools.partial(copy.deepcopy, self.listed[extra])
        return x

    def _spread(self, numbers: Sequence[int], lengths: Sequence[int]) -> Tensor:
        each = [x for x, n in zip(numbers, lengths, strict=True) for _ in range(n)]
        return torch.tensor(each, dtype=torch.int64, device=self.vision.device)

    def row_tokens(self) -> list[int]:
        """Vision tokens of each row."""
        counts = self._counted
        return [
            sum(n for n, row in zip(counts.images, counts.rows, strict=True) if row == r)
            for r in range(len(counts.text))
        ]
