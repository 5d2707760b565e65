"""How many tokens, and in which layers: the types of a pass's fields."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, TypeGuard

from pydantic import PlainValidator

from vlmrewrite.errors import shown

_BUDGET = "an int >= 1 (tokens per image) or a float in (0, 1] (fraction of an image's tokens)"

_DEPTH = "an int >= 0 (layer) or a float in [0, 1) (fraction of the decoder's depth)"


def _budget(value: object) -> int | float:
    if type(value) is int and value >= 1:
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return float(value)
    raise ValueError(f"expected {_BUDGET}, got {shown(value)}")


def _is_depth(value: object) -> TypeGuard[int | float]:
    return (type(value) is int and value >= 0) or (isinstance(value, float) and 0 <= value < 1)


def check_depth(value: object, alternative: str = "") -> int | float:
    """The value, if it is a :data:`Depth`; ``alternative`` is what else the error says was expected."""
    if not _is_depth(value):
        raise ValueError(f"expected {_DEPTH}{alternative}, got {shown(value)}")
    return value if isinstance(value, int) else float(value)


Budget = Annotated[int | float, PlainValidator(_budget)]
"""How many vision tokens to keep: an `int` >= 1 is tokens per image, a `float` in (0, 1] a fraction of each image's."""

Per = Literal["frame", "image", "row"]
"""What a budget is of: each frame (an image is one), each image or whole video, or all of a row together."""

Depth = Annotated[int | float, PlainValidator(check_depth)]
"""Before which decoder layer: an `int` >= 0 is the layer, a `float` in [0, 1) a fraction of the decoder's depth."""

_LAYERS = (
    "a list of different layers (int >= 0, or float in [0, 1): fraction of the depth), or a float in (0, 1] (that share"
    " of the layers, evenly spaced)"
)


def _layers(value: object) -> tuple[int | float, ...] | float:
    if isinstance(value, float) and 0 < value <= 1:
        return float(value)
    if isinstance(value, list | tuple) and all(map(_is_depth, value)) and len(set(value)) == len(value):
        return tuple(map(check_depth, value))
    raise ValueError(f"expected {_LAYERS}, got {shown(value)}")


Layers = Annotated[Sequence[int | float] | float, PlainValidator(_layers)]
"""Some of the decoder's layers: a list of layers (`int`) and fractions of the depth (`float` in [0, 1)), or one `float`
in (0, 1], a share of all layers that are spaced evenly. A list becomes a tuple."""


def tokens_kept(keep: Budget, n: int) -> int:
    """How many of an image's `n` tokens a budget keeps: at least one if there is one, at most all.

    Args:
        keep: tokens (int), or fraction of `n` (float), which is rounded to the nearest count, halves to even.
        n: tokens of the image.

    Raises:
        ValueError: `keep` is no budget or `n` is negative.
    """
    keep = _budget(keep)
    if n < 0:
        raise ValueError(f"expected a number of tokens n >= 0, got {n}")
    return min(n, keep if isinstance(keep, int) else max(1, round(keep * n)))


def layer_index(at: Depth, depth: int) -> int:
    """The decoder layer that `at` names, in 0 .. depth - 1.

    A fraction is rounded down; a product within 1e-9 below a whole number counts as that number, so that
    `layer_index(i / depth, depth) == i`.

    Args:
        at: layer (int), or fraction of the depth (float).
        depth: number of decoder layers.

    Raises:
        ValueError: `at` is no depth, or names a layer that is not there.
    """
    at = check_depth(at)
    if depth < 1:
        raise ValueError(f"expected a decoder of at least one layer, got {depth}")
    if isinstance(at, float):
        return min(math.floor(at * depth + 1e-9), depth - 1)
    if at >= depth:
        raise ValueError(f"expected a layer in 0 .. {depth - 1} (the decoder has {depth}), got {at}")
    return at


def chosen_layers(layers: Layers, depth: int, among: Sequence[int] | None = None) -> list[int]:
    """The layers meant, ascending; fractions that fall on one layer name it once.

    Args:
        layers: a list, or a share p: of the n layers in question those at floor(i * n / k), k = round(p * depth),
            at least one and at most n.
        depth: number of decoder layers.
        among: the layers that a share is taken from, ascending; None: all.

    Raises:
        ValueError: a layer is not there.
    """
    if not isinstance(layers, float):
        return sorted({layer_index(at, depth) for at in layers})
    free = range(depth) if among is None else among
    k = min(len(free), max(1, round(layers * depth)))
    return [free[i * len(free) // k] for i in range(k)]
