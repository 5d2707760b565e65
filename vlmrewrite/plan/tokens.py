"""Token sets: what a pass may say about which tokens, as small immutable expressions.

A set has a text part (all text tokens, the last one, or none) and a vision part, an expression over the vision tokens,
which operators keep apart. At run time it is a boolean membership and a sorted index [B, n] into the sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import add
from typing import TYPE_CHECKING, ClassVar, TypeVar

from vlmrewrite.plan.budget import Budget

if TYPE_CHECKING:
    from vlmrewrite.plan.policy import Policy


T = TypeVar("T")
Op = Callable[[T, T], T]


@dataclass(frozen=True)
class TokenSet:
    """Base of all token sets; combine with ``|``, ``&`` and ``-``, narrow with :meth:`select`."""

    def __or__(self, other: TokenSet) -> TokenSet:
        return union(self, other)

    def __and__(self, other: TokenSet) -> TokenSet:
        return intersection(self, other)

    def __sub__(self, other: TokenSet) -> TokenSet:
        return difference(self, other)

    def expression(self, names: Mapping[Selection, str]) -> str:
        """The set as text, selections by the names given or, without one, spelled out."""
        return str(self)

    def select(self, policy: Policy, keep: Budget, *, at: int = 0) -> Selection:
        """Choose ``keep`` tokens per image (int), or a fraction of each image's tokens (float), at layer ``at``.

        Raises:
            ValueError: the set contains text, which is never dropped.
        """
        if has_text(self):
            raise ValueError(f"only vision tokens can be selected from, got {self}; take {self} & Vision")
        return Selection(self, policy, keep, at)


@dataclass(frozen=True)
class _All(TokenSet):
    """Every token, padding included."""

    def __str__(self) -> str:
        return "All"


@dataclass(frozen=True)
class _Text(TokenSet):
    """Every token that is neither vision nor padding, and the last prompt token whatever it is."""

    def __str__(self) -> str:
        return "Text"


@dataclass(frozen=True)
class _Vision(TokenSet):
    """Every vision token."""

    def __str__(self) -> str:
        return "Vision"


@dataclass(frozen=True)
class _Last(TokenSet):
    """The last prompt token of each row."""

    def __str__(self) -> str:
        return "Last"


@dataclass(frozen=True)
class _Nothing(TokenSet):
    """No token."""

    def __str__(self) -> str:
        return "Nothing"


@dataclass(frozen=True)
class Image(TokenSet):
    """The vision tokens of the ``index``-th image of each row, from 0."""

    index: int

    def __str__(self) -> str:
        return f"Image({self.index})"


@dataclass(frozen=True)
class Selection(TokenSet):
    """``keep`` tokens of each image, chosen from ``source`` by ``policy`` at layer ``at``."""

    source: TokenSet
    policy: Policy
    keep: Budget
    at: int

    def expression(self, names: Mapping[Selection, str]) -> str:
        """Its name, or how it is chosen."""
        if self in names:
            return names[self]
        options = "".join(f", {x}" for x in self.policy.options)
        return f"{_inner(self.source, names)}.{self.policy.name}({self.keep}, at={self.at}{options})"

    def __str__(self) -> str:
        return self.expression({})


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

    def __str__(self) -> str:
        return self.expression({})


class Union(Pair):
    """Tokens in either set."""

    symbol = "|"


class Intersection(Pair):
    """Tokens in both sets."""

    symbol = "&"


class Difference(Pair):
    """Tokens of the left set that are not in the right one."""

    symbol = "-"


All, Text, Vision, Last, Nothing = _All(), _Text(), _Vision(), _Last(), _Nothing()


def _inner(s: TokenSet, names: Mapping[Selection, str]) -> str:
    text = s.expression(names)
    return f"({text})" if isinstance(s, Pair) else text


def fold(s: TokenSet, leaf: Callable[[TokenSet], T], either: Op[T], both: Op[T], without: Op[T]) -> T:
    """Interpret a set: ``leaf`` of what is no pair, put together by what ``|``, ``&`` and ``-`` mean."""
    if not isinstance(s, Pair):
        return leaf(s)
    meaning = either if isinstance(s, Union) else both if isinstance(s, Intersection) else without
    return meaning(*(fold(part, leaf, either, both, without) for part in (s.left, s.right)))


_TEXTS = (Nothing, Last, Text)


def text_part(s: TokenSet) -> TokenSet:
    """The text tokens of a set: Text, Last or Nothing."""
    if isinstance(s, Union):
        return max(text_part(s.left), text_part(s.right), key=_TEXTS.index)
    return Text if s == All else s if s in _TEXTS else Nothing


def vision_part(s: TokenSet) -> TokenSet:
    """The vision tokens of a set, as an expression over vision tokens alone."""
    if isinstance(s, Union):
        return _either(vision_part(s.left), vision_part(s.right))
    return Vision if s == All else Nothing if s in _TEXTS else s


def _joined(text: TokenSet, vision: TokenSet) -> TokenSet:
    if Nothing in (text, vision):
        return vision if text == Nothing else text
    return All if (text, vision) == (Text, Vision) else Union(text, vision)


def union(a: TokenSet, b: TokenSet) -> TokenSet:
    """``a | b``, simplified to a text part and a vision part."""
    text = max(text_part(a), text_part(b), key=_TEXTS.index)
    return _joined(text, _either(vision_part(a), vision_part(b)))


def intersection(a: TokenSet, b: TokenSet) -> TokenSet:
    """``a & b``, simplified to a text part and a vision part."""
    text = min(text_part(a), text_part(b), key=_TEXTS.index)
    return _joined(text, _both(vision_part(a), vision_part(b)))


def difference(a: TokenSet, b: TokenSet) -> TokenSet:
    """``a - b``, simplified to a text part and a vision part.

    Raises:
        ValueError: the text without its last token is asked for, which no layer could do anything with.
    """
    text, less = text_part(a), text_part(b)
    if text == Text and less == Last:
        raise ValueError(f"{a} - {b} would drop the last prompt token; expected all text or none to be taken away")
    return _joined(Nothing if less != Nothing else text, _without(vision_part(a), vision_part(b)))


def _either(a: TokenSet, b: TokenSet) -> TokenSet:
    if _within(b, a):
        return a
    if _within(a, b):
        return b
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
    return a if _disjoint(a, b) else Difference(a, b)


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
    if isinstance(b, Selection):
        return _within(b.source, a)
    if isinstance(b, Intersection):
        return _within(b.left, a) or _within(b.right, a)
    return isinstance(b, Difference) and _within(b.left, a)


def _disjoint(a: TokenSet, b: TokenSet) -> bool:
    """Whether two vision sets have no token in common, as far as the expressions alone tell."""
    if Nothing in (a, b):
        return True
    if isinstance(a, Image) and isinstance(b, Image):
        return a.index != b.index
    for x, y in ((a, b), (b, a)):
        if isinstance(x, Selection) and _disjoint(x.source, y):
            return True
        if isinstance(x, Union) and _disjoint(x.left, y) and _disjoint(x.right, y):
            return True
        if isinstance(x, Intersection) and (_disjoint(x.left, y) or _disjoint(x.right, y)):
            return True
        if isinstance(x, Difference) and (_disjoint(x.left, y) or _within(y, x.right)):
            return True
    return False


def contains(a: TokenSet, b: TokenSet) -> bool:
    """Whether every token of ``b`` is one of ``a``, as far as the expressions alone tell."""
    if a in (b, All):
        return True
    return _TEXTS.index(text_part(a)) >= _TEXTS.index(text_part(b)) and _within(vision_part(b), vision_part(a))


def has_text(s: TokenSet) -> bool:
    """Whether the set holds text tokens."""
    return text_part(s) != Nothing


def substitute(s: TokenSet, old: TokenSet, new: TokenSet) -> TokenSet:
    """``s`` with ``old``, wherever it occurs, replaced by ``new``; All counts as Text | Vision.

    A selection that was made before ``new`` is chosen, at an earlier layer or by an earlier pass at the same one, stays
    as it is.
    """
    if s == old:
        return new
    if s == All and old == Vision:
        return union(Text, new)
    if isinstance(s, Selection) and not any(x.at >= s.at for x in selections(new)):
        return Selection(substitute(s.source, old, new), s.policy, s.keep, s.at)
    if isinstance(s, Pair):
        left, right = substitute(s.left, old, new), substitute(s.right, old, new)
        return left | right if isinstance(s, Union) else left & right if isinstance(s, Intersection) else left - right
    return s


def selections(s: TokenSet) -> list[Selection]:
    """All selections in the expression, sources before what is selected from them."""
    return fold(s, lambda x: [*selections(x.source), x] if isinstance(x, Selection) else [], add, add, add)
