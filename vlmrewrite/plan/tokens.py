"""Token sets: what a pass may say about which tokens, as small immutable expressions.

A set has a text part (all text tokens, the last one, or none) and a vision part, an expression over the vision tokens,
which operators keep apart. At run time it is a boolean membership and a sorted index [B, n] into the sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from vlmrewrite.plan.budget import Budget, Per

if TYPE_CHECKING:
    from vlmrewrite.plan.vocabulary import Policy


@dataclass(frozen=True)
class TokenSet:
    """Base of all token sets; combine with ``|``, ``&`` and ``-``, narrow with :meth:`select`.

    What the operators return is simplified to a text part and a vision part.
    """

    def __or__(self, other: TokenSet) -> TokenSet:
        text = max(self.text_part(), other.text_part(), key=_TEXTS.index)
        return _joined(text, _either(self.vision_part(), other.vision_part()))

    def __and__(self, other: TokenSet) -> TokenSet:
        text = min(self.text_part(), other.text_part(), key=_TEXTS.index)
        return _joined(text, _both(self.vision_part(), other.vision_part()))

    def __sub__(self, other: TokenSet) -> TokenSet:
        """The tokens that are not in the other set.

        Raises:
            ValueError: the text without its last token is asked for, which no layer could do anything with.
        """
        text, less = self.text_part(), other.text_part()
        if text == Text and less == Last:
            raise ValueError(f"{self} - {other} would drop the last prompt token; expected all text or none taken away")
        return _joined(Nothing if less != Nothing else text, _without(self.vision_part(), other.vision_part()))

    def text_part(self) -> TokenSet:
        """The text tokens of the set: Text, Last or Nothing."""
        if isinstance(self, Union):
            return max(self.left.text_part(), self.right.text_part(), key=_TEXTS.index)
        return Text if self == All else self if self in _TEXTS else Nothing

    def vision_part(self) -> TokenSet:
        """The vision tokens of the set, as an expression over vision tokens alone."""
        if isinstance(self, Union):
            return _either(self.left.vision_part(), self.right.vision_part())
        return Vision if self == All else Nothing if self in _TEXTS else self

    def expression(self, names: Mapping[Selection, str]) -> str:
        """The set as text, selections by the names given or, without one, spelled out."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.expression({})

    def select(self, policy: Policy, keep: Budget, *, at: int = 0, per: Per = "image") -> Selection:
        """Choose ``keep`` tokens per image (int), or a fraction of each image's tokens (float), at layer ``at``.

        Args:
            policy: how they are chosen.
            keep: how many.
            at: before which layer.
            per: what the budget is of: a ``"frame"`` (an image is one), an ``"image"`` (or a whole video), or all
                images and videos of a ``"row"`` together.

        Raises:
            ValueError: the set contains text, which is never dropped.
        """
        if has_text(self):
            raise ValueError(f"only vision tokens can be selected from, got {self}; take {self} & Vision")
        return Selection(self, policy, keep, at, isinstance(keep, float), per)


@dataclass(frozen=True)
class _Word(TokenSet):
    word: str

    def expression(self, names: Mapping[Selection, str]) -> str:
        return self.word


All = _Word("All")
"""Every token, padding included."""

Text = _Word("Text")
"""Every token that is neither vision nor padding, and the last prompt token whatever it is."""

Vision = _Word("Vision")
"""Every vision token."""

Images = _Word("Images")
"""Every vision token of an image."""

Videos = _Word("Videos")
"""Every vision token of a video."""

Last = _Word("Last")
"""The last prompt token of each row."""

Nothing = _Word("Nothing")
"""No token."""

_TEXTS = (Nothing, Last, Text)


@dataclass(frozen=True)
class Image(TokenSet):
    """The vision tokens of the ``index``-th image of each row, from 0."""

    index: int

    def expression(self, names: Mapping[Selection, str]) -> str:
        """Its number."""
        return f"Image({self.index})"


@dataclass(frozen=True)
class Video(TokenSet):
    """The vision tokens of the ``index``-th video of each row, from 0."""

    index: int

    def expression(self, names: Mapping[Selection, str]) -> str:
        """Its number."""
        return f"Video({self.index})"


@dataclass(frozen=True)
class Frame(TokenSet):
    """The vision tokens of the ``index``-th frame of each video, from 0."""

    index: int

    def expression(self, names: Mapping[Selection, str]) -> str:
        """Its number."""
        return f"Frame({self.index})"


@dataclass(frozen=True)
class Selection(TokenSet):
    """``keep`` tokens of each image, chosen from ``source`` by ``policy`` at layer ``at``.

    ``fraction``: whether ``keep`` is one, for 1 and 1.0 are equal to Python. ``per``: what the budget is of.
    """

    source: TokenSet
    policy: Policy
    keep: Budget
    at: int
    fraction: bool = False
    per: Per = "image"

    def expression(self, names: Mapping[Selection, str]) -> str:
        """Its name, or how it is chosen."""
        if self in names:
            return names[self]
        options = "".join(f", {x}" for x in self.policy.options)
        per = "" if self.per == "image" else f", per={self.per}"
        return f"{_inner(self.source, names)}.{self.policy.name}({self.keep}, at={self.at}{per}{options})"


@dataclass(frozen=True)
class Pair(TokenSet):
    """Two sets combined."""

    left: TokenSet
    right: TokenSet
    symbol: ClassVar[str] = "?"

    def expression(self, names: Mapping[Selection, str]) -> str:
        """Both parts around the symbol."""
        both = (self.left, self.right)
        flat = (s.expression(names) if self.symbol == "|" and isinstance(s, Union) else _inner(s, names) for s in both)
        return f" {self.symbol} ".join(flat)


class Union(Pair):
    """Tokens in either set."""

    symbol = "|"


class Intersection(Pair):
    """Tokens in both sets."""

    symbol = "&"


class Difference(Pair):
    """Tokens of the left set that are not in the right one."""

    symbol = "-"


OPERATORS = {"|": TokenSet.__or__, "&": TokenSet.__and__, "-": TokenSet.__sub__}
"""What the symbol of a pair stands for."""


def _inner(s: TokenSet, names: Mapping[Selection, str]) -> str:
    text = s.expression(names)
    return f"({text})" if isinstance(s, Pair) else text


def _joined(text: TokenSet, vision: TokenSet) -> TokenSet:
    if Nothing in (text, vision):
        return vision if text == Nothing else text
    return All if (text, vision) == (Text, Vision) else Union(text, vision)


def _either(a: TokenSet, b: TokenSet) -> TokenSet:
    if _within(b, a):
        return a
    if _within(a, b):
        return b
    if all(any(_within(x, s) for s in (a, b)) for x in (Images, Videos)):
        return Vision
    return Union(*sorted((a, b), key=str))


def _both(a: TokenSet, b: TokenSet) -> TokenSet:
    if _within(b, a):
        return b
    if _within(a, b):
        return a
    return Nothing if _disjoint(a, b) else Intersection(a, b)


def _without(a: TokenSet, b: TokenSet) -> TokenSet:
    if _within(a, b):
        return Nothing
    if isinstance(b, Difference) and b.left == a:
        return _both(a, b.right)
    if a == Vision and b in (Images, Videos):
        return Videos if b == Images else Images
    return a if _disjoint(a, b) else Difference(a, b)


def _around(s: TokenSet) -> tuple[TokenSet, ...]:
    """Sets that hold all of a vision set, by its expression."""
    if isinstance(s, Selection):
        return (s.source,)
    if isinstance(s, (Image, Video, Frame)):
        return (Images if isinstance(s, Image) else Videos,)
    if isinstance(s, Intersection):
        return (s.left, s.right)
    return (s.left,) if isinstance(s, Difference) else ()


def _within(b: TokenSet, a: TokenSet) -> bool:
    """Whether vision set ``b`` is part of vision set ``a``, as far as the expressions alone tell."""
    if a in (b, Vision) or b == Nothing:
        return True
    if isinstance(b, Union):
        return _within(b.left, a) and _within(b.right, a)
    if isinstance(a, Union) and (_within(b, a.left) or _within(b, a.right)):
        return True
    if isinstance(a, Intersection) and _within(b, a.left) and _within(b, a.right):
        return True
    if isinstance(a, Difference) and _within(b, a.left) and _disjoint(b, a.right):
        return True
    return any(_within(s, a) for s in _around(b))


def _disjoint(a: TokenSet, b: TokenSet) -> bool:
    """Whether two vision sets have no token in common, as far as the expressions alone tell."""
    if Nothing in (a, b):
        return True
    if isinstance(a, (Image, Video, Frame)) and type(a) is type(b):
        return a != b
    if {a, b} == {Images, Videos}:
        return True
    for x, y in ((a, b), (b, a)):
        if any(_disjoint(s, y) for s in _around(x)) or (isinstance(x, Difference) and _within(y, x.right)):
            return True
        if isinstance(x, Union) and _disjoint(x.left, y) and _disjoint(x.right, y):
            return True
    return False


def contains(a: TokenSet, b: TokenSet) -> bool:
    """Whether every token of ``b`` is one of ``a``, as far as the expressions alone tell."""
    if a in (b, All):
        return True
    return _TEXTS.index(a.text_part()) >= _TEXTS.index(b.text_part()) and _within(b.vision_part(), a.vision_part())


def has_text(s: TokenSet) -> bool:
    """Whether the set holds text tokens."""
    return s.text_part() != Nothing
