"""Token sets inside other token sets: found, replaced, and taken back to what they were at an earlier layer."""

from __future__ import annotations

from dataclasses import replace

from vlmrewrite.plan.tokens import OPERATORS, All, Difference, Pair, Selection, Text, TokenSet, Vision


def substitute(s: TokenSet, old: TokenSet, new: TokenSet) -> TokenSet:
    """``s`` with ``old``, wherever it occurs, replaced by ``new``; All counts as Text | Vision.

    A selection that was made before ``new`` is chosen, at an earlier layer or by an earlier pass at the same one, stays
    as it is.
    """
    if s == old:
        return new
    if s == All and old == Vision:
        return Text | new
    if isinstance(s, Selection) and not any(x.at >= s.at for x in selections(new)):
        return replace(s, source=substitute(s.source, old, new))
    if isinstance(s, Pair):
        return OPERATORS[s.symbol](substitute(s.left, old, new), substitute(s.right, old, new))
    return s


def narrowed(s: TokenSet, left: TokenSet, chosen: TokenSet) -> TokenSet:
    """``s`` where of its vision tokens, so far from ``left``, only those that are ``chosen`` remain."""
    return s.text_part() | (substitute(s.vision_part(), left, chosen) & chosen)


def as_of(s: TokenSet, layer: int) -> TokenSet:
    """A vision set with selections that are made deeper than ``layer`` replaced by what they select from."""
    if isinstance(s, Selection):
        return as_of(s.source, layer) if s.at > layer else s
    if not isinstance(s, Pair):
        return s
    left, right = as_of(s.left, layer), as_of(s.right, layer)
    if isinstance(s, Difference) and right != s.right:  # what is taken away later has not been taken away yet
        return left
    return OPERATORS[s.symbol](left, right)


def selections(s: TokenSet) -> list[Selection]:
    """All selections in the expression, sources before what is selected from them."""
    if isinstance(s, Pair):
        return selections(s.left) + selections(s.right)
    return [*selections(s.source), s] if isinstance(s, Selection) else []
