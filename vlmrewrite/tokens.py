"""Token sets: what a pass may say about which tokens, as small immutable expressions.

A set has a text part (all text tokens or none) and a vision part, an expression over the vision tokens. At run time
it is a boolean membership and a sorted index [B, n] into the logical sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from vlmrewrite.budget import Budget


@dataclass(frozen=True)
class Policy:
    """How a selection chooses: an operator over an image's vision tokens.

    Args:
        name: what listings call it.
        op: called as ``op(*inputs, member, lengths, keep, *options)`` with ``member`` bool [F] (which of the call's F
            vision tokens are left), ``lengths`` int64 [I] (tokens of each image, on the CPU) and ``keep`` int64 [I]
            (how many to choose of each, on the CPU); returns the chosen ones as bool [F].
        needs: the inputs it wants, each one of ``"features"`` (projected, [F, C]), ``"encoder_features"`` (what the
            projector took, [F, C']), ``"attention"`` (weight received from the last prompt token, fp32 [F]) or
            ``"ordinal"`` (number of its image within the row, int64 [I], on the CPU).
        options: further arguments of ``op``.
    """

    name: str
    op: Callable[..., Any]
    needs: tuple[str, ...] = ()
    options: tuple[Any, ...] = ()

    KNOWN: ClassVar[tuple[str, ...]] = ("features", "encoder_features", "attention", "ordinal")

    def __post_init__(self) -> None:
        for need in self.needs:
            if need not in self.KNOWN:
                raise ValueError(f"policy {self.name!r} needs {need!r}; expected one of {', '.join(self.KNOWN)}")


@dataclass(frozen=True)
class TokenSet:
    """Base of all token sets; combine with ``|``, ``&`` and ``-``, narrow with :meth:`select`."""

    def __or__(self, other: TokenSet) -> TokenSet:
        return union(self, other)

    def __and__(self, other: TokenSet) -> TokenSet:
        return intersection(self, other)

    def __sub__(self, other: TokenSet) -> TokenSet:
        return difference(self, other)

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
    """Every token that is neither vision nor padding."""

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

    def __str__(self) -> str:
        return f"{self.source}.{self.policy.name}({self.keep}, at={self.at})"


@dataclass(frozen=True)
class Pair(TokenSet):
    """Two sets combined."""

    left: TokenSet
    right: TokenSet
    symbol: ClassVar[str] = "?"

    def __str__(self) -> str:
        return f"{_inner(self.left)} {self.symbol} {_inner(self.right)}"


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


def _inner(s: TokenSet) -> str:
    return f"({s})" if isinstance(s, Pair) else str(s)


def union(a: TokenSet, b: TokenSet) -> TokenSet:
    """``a | b``, simplified."""
    if contains(a, b):
        return a
    if contains(b, a):
        return b
    if {a, b} == {Text, Vision}:
        return All
    return Union(*sorted((a, b), key=lambda s: (not has_text(s), str(s))))


def intersection(a: TokenSet, b: TokenSet) -> TokenSet:
    """``a & b``, simplified."""
    if contains(a, b):
        return b
    if contains(b, a):
        return a
    if {a, b} == {Text, Vision}:
        return Nothing
    if b in (Text, Vision):
        a, b = b, a
    if a in (Text, Vision) and isinstance(b, Union):
        return union(intersection(a, b.left), intersection(a, b.right))
    if (a == Text and not has_text(b)) or (b == Text and not has_text(a)):
        return Nothing
    return Intersection(a, b)


def difference(a: TokenSet, b: TokenSet) -> TokenSet:
    """``a - b``, simplified."""
    if contains(b, a):
        return Nothing
    if a == All and b in (Text, Vision):
        return Vision if b == Text else Text
    if intersection(a, b) == Nothing:
        return a
    return Difference(a, b)


def contains(a: TokenSet, b: TokenSet) -> bool:
    """Whether every token of ``b`` is one of ``a``, as far as the expressions alone tell."""
    if a in (b, All) or b == Nothing:
        return True
    if isinstance(b, Union):
        return contains(a, b.left) and contains(a, b.right)
    if isinstance(a, Union):
        return contains(a.left, b) or contains(a.right, b)
    if isinstance(b, Selection):
        return contains(a, b.source)
    if isinstance(b, Image):
        return a == Vision
    if isinstance(b, Intersection):
        return contains(a, b.left) or contains(a, b.right)
    if isinstance(b, Difference):
        return contains(a, b.left)
    return False


def has_text(s: TokenSet) -> bool:
    """Whether the set may hold text tokens."""
    if isinstance(s, Intersection):
        return has_text(s.left) and has_text(s.right)
    if isinstance(s, Difference):
        return has_text(s.left) and not contains(s.right, Text)
    if isinstance(s, Pair):
        return has_text(s.left) or has_text(s.right)
    return s in (All, Text, Last)


def substitute(s: TokenSet, old: TokenSet, new: TokenSet) -> TokenSet:
    """``s`` with ``old``, wherever it occurs, replaced by ``new``; All counts as Text | Vision."""
    if s == old:
        return new
    if s == All and old == Vision:
        return union(Text, new)
    if isinstance(s, Selection):
        return Selection(substitute(s.source, old, new), s.policy, s.keep, s.at)
    if isinstance(s, Pair):
        combine = {Union: union, Intersection: intersection, Difference: difference}[type(s)]
        return combine(substitute(s.left, old, new), substitute(s.right, old, new))
    return s


def selections(s: TokenSet) -> list[Selection]:
    """All selections in the expression, sources before what is selected from them."""
    if isinstance(s, Selection):
        return [*selections(s.source), s]
    if isinstance(s, Pair):
        return selections(s.left) + selections(s.right)
    return []
