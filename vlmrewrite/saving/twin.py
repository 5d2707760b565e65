"""A rewritten model as it was before, made of the same tensors."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from vlmrewrite.hf import APPLIED, Undo


def sharing(model: nn.Module) -> Any:
    """A model of other modules without the recipe, with the same tensors.

    Args:
        model: a rewritten one; it stays as it is, and may be in use meanwhile.
    """
    made = type(model).__new__(type(model))
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    memo[id(model)] = made
    own = {name: x for name, x in vars(model).items() if name != APPLIED}
    vars(made).update(copy.deepcopy(own, memo))
    undo: Undo = copy.deepcopy(vars(model)[APPLIED], memo)
    undo.close(thaw=False)
    return made
