"""What is below a model's head while a recipe is applied, or while it is captured."""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlmrewrite import hf
from vlmrewrite.compat import inside_torch_compile
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.ops import resolve
from vlmrewrite.runtime.around import handed_on, watched_for
from vlmrewrite.runtime.facts import current_prompt
from vlmrewrite.runtime.session import Session, session_of


def put_below(undo: hf.Undo, model: nn.Module, session: Session | None) -> None:
    """Let calls of a model's base by others than the model go by its recipe, and its decoder be watched.

    All of it from the start and whenever a model is captured: what stands there is a part of what a graph was made of.

    Args:
        undo: takes it off again.
        model: whose base it is; a base with a forward of its own keeps it.
        session: the recipe's; None while a model without one is captured.
    """
    base: Any = model.base_model
    if base is not model and hf.has_own_forward(base):
        below = in_place(type(base).forward, _below(session, model))
        hf.put_forward(undo, base, types.MethodType(below, base))
    watched_for(undo, hf.decoder_of(model))


def in_place(own: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that looks like a class's own, and does something else."""
    return functools.wraps(own)(lambda *args, **kwargs: method(*args, **kwargs))


_REASON = "a rewritten model is compiled by apply(..., backend='inductor') and exported by vlmrewrite.export"


@torch.compiler.disable(reason=_REASON)  # type: ignore[untyped-decorator]
def behind_compile(session: Session | None, run: Callable[..., Any], self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a forward of a rewritten model that somebody put behind ``torch.compile``, and say so once."""
    session = session or session_of(self)
    eager = resolve(session.backend, hf.device_of(self)) == "eager"
    if eager and not session.compile_told and current_prompt(session) is None:  # generate() compiles on its own account
        session.compile_told = True
        message = "torch.compile around a rewritten model compiles nothing: apply(..., backend='inductor') does"
        warnings.warn(message, stacklevel=3)
    return run(self, *args, **kwargs)


def _below(session: Session | None, model: nn.Module) -> Callable[..., Any]:
    """What is below the model's head, when somebody else than the model calls it (a trainer with a head of its own)."""
    this = weakref.ref(model)

    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        whole: Any = this()
        inside = whole is None or current_prompt((session, "call")) is not None
        if inside or hf.has_own_forward(whole):  # the oracle takes it off
            return handed_on(self, *args, **kwargs)
        if self is not whole.base_model:
            raise ValueError(
                f"this {type(self).__name__} is a copy of a part of a model that a recipe is applied to, and not"
                " rewritten: copy the whole model, or call vlmrewrite.restore(model) first"
            )
        if self is not hf.decoder_of(whole):
            assert session is not None, "without one, no forward stands on the whole model"
            return session.below(whole, self, args, kwargs)
        if hf.images_of(hf.named(self, args, kwargs)):
            raise NotImplementedError(
                f"a recipe is applied to this {type(whole).__name__}, and its {type(self).__name__}, which encodes"
                " images and is its decoder too, was called with images: expected a call of the whole model"
            )
        return handed_on(self, *args, **kwargs)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not inside_torch_compile():
            return run(self, *args, **kwargs)
        if isinstance(kwargs.get("past_key_values"), PositionCache) or session is None:  # it is being captured
            return handed_on(self, *args, **kwargs)
        return behind_compile(session, run, self, *args, **kwargs)

    return forward
