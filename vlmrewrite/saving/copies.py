"""A rewritten model in a copy, or a pickle: the model without its recipe, and the recipe applied to it anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from vlmrewrite.hf import APPLIED
from vlmrewrite.ops import Backend, Kernels
from vlmrewrite.plan import ATTRIBUTE, FEATURES, Plan, run_passes
from vlmrewrite.recipe import Recipe
from vlmrewrite.runtime import Session, install_session, session_of
from vlmrewrite.saving.pretrained import load_state_dict, save_pretrained
from vlmrewrite.saving.twin import sharing


def reduce(self: nn.Module, _: Any) -> tuple[Any, ...]:
    """The model without its recipe, which shares its tensors, and what is needed to apply the recipe again.

    Deep copies are made by it too: a ``__deepcopy__`` of the model would be taken for that of a wrapper around it.
    """
    session = session_of(self)
    frozen = {id(p) for p in vars(self)[APPLIED].frozen}
    names = [name for name, p in self.named_parameters(remove_duplicate=False) if id(p) in frozen]
    how = session.recipe, session.backend, session.kernels, session.strict, session.inner
    return revived, (sharing(self), getattr(self, ATTRIBUTE, None), names, session.plan.depth, *how)


def revived(
    model: nn.Module,
    blocks: nn.Module | None,
    frozen: list[str],
    depth: int,
    recipe: Recipe,
    backend: Backend,
    kernels: Kernels,
    strict: bool,
    inner: bool,
) -> nn.Module:
    """What :func:`reduce` has taken apart, whole again; what asks for a gradient goes on doing so."""
    plan, _ = run_passes(Plan(depth, frozenset(FEATURES)), recipe.passes)
    named = dict(model.named_parameters(remove_duplicate=False))
    asked = [(p, p.requires_grad) for p in model.parameters()]
    install_session(model, Session(recipe, backend, kernels, strict, plan, blocks, inner), METHODS)
    for p, wanted in asked:
        p.requires_grad_(wanted)
    vars(model)[APPLIED].frozen = [named[name] for name in frozen]
    return model


METHODS: dict[str, Callable[..., Any]] = {
    "save_pretrained": save_pretrained,
    "load_state_dict": load_state_dict,
    "__reduce_ex__": reduce,
}
"""What stands on a rewritten model in place of its class's ways to save, load and copy it, by name."""
