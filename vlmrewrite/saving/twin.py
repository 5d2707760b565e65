"""A rewritten model as it was before, in a copy."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from vlmrewrite.hf import APPLIED, Undo


def without_recipe(model: nn.Module, memo: dict[int, Any]) -> tuple[Any, list[nn.Parameter]]:
    """A copy of a rewritten model as it was before, and its parameters that asked for a gradient then.

    Args:
        model: the model; it stays as it is, and may be in use meanwhile.
        memo: that of :func:`copy.deepcopy`; it knows the copy's parts afterwards.
    """
    made = type(model).__new__(type(model))
    memo[id(model)] = made
    own = {name: x for name, x in vars(model).items() if name != APPLIED}
    vars(made).update(copy.deepcopy(own, memo))
    undo: Undo = copy.deepcopy(vars(model)[APPLIED], memo)
    undo.close(thaw=False)
    return made, undo.frozen


def sharing(model: nn.Module) -> Any:
    """The model without its recipe, with the same tensors."""
    same = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    return without_recipe(model, same)[0]
