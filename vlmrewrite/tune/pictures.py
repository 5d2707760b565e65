"""The control of smaller pictures: how small they must be to cost no more than a budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlmrewrite.evaluate import Sample, encode, plain_costs
from vlmrewrite.recipe import Recipe

_STEPS = 64
"""Sizes that are told apart."""


def smaller_pictures(
    kind: type[Any], model: Any, processor: Any, samples: Sequence[Sample], cost: str, share: float
) -> tuple[Recipe, dict[str, float]]:
    """The largest pictures that cost no more, and what they cost.

    Args:
        kind: of the pass, which is made by ``keep``.
        model: unmodified.
        processor: the model's.
        samples: by which costs go.
        cost: ``"flops"`` or ``"kv"``.
        share: of the unmodified model's.

    Raises:
        ValueError: the processor makes no smaller pictures, the model takes none, or none are small enough.
    """
    before = plain_costs(model, encode(processor, samples))

    def made(step: int) -> tuple[Recipe, dict[str, float]]:
        recipe = Recipe(name=kind.name, passes=(kind(keep=step / _STEPS),))
        after = plain_costs(model, encode(recipe.processor(processor), samples))
        return recipe, {"flops": after["flops"] / before["flops"], "kv": after["kv_bytes"] / before["kv_bytes"]}

    low, high, best = 0, _STEPS, None
    while high - low > 1:
        middle = (low + high) // 2
        found = made(middle)
        low, high, best = (middle, high, found) if found[1][cost] <= share else (low, middle, best)
    if best is None:
        raise ValueError(f"the smallest pictures cost more than {share:g} of the {cost}")
    return best
