"""A session's place on a model: its forward and generate, its blocks, its attention implementation."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, NoReturn, cast

from torch import nn
from transformers.utils.generic import can_return_tuple

from vlmrewrite import capture
from vlmrewrite.compat import inside_torch_compile
from vlmrewrite.hf import swap_attention, watched
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.runtime.facts import ARGUMENT, Prompt, current_prompt, prompt_of
from vlmrewrite.runtime.session import Session

SESSIONS: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


def install_session(model: nn.Module, session: Session) -> None:
    """Put a session on a model; :func:`remove_session` takes it off, also after a failure half way."""
    capture.register()
    session.undo.callback(swap_attention(model))
    if "encoder_features" in session.plan.needs():
        base = cast(nn.Module, model.base_model)
        encoder = cast(Callable[..., Any], base.get_image_features)
        base.__dict__["get_image_features"] = watched(model, encoder, session.encoded)
        session.undo.callback(base.__dict__.pop, "get_image_features", None)
    if session.blocks:
        _register(model, session)
    for name, method in _METHODS.items():
        model.__dict__[name] = types.MethodType(_in_place_of(getattr(type(model), name, method), method), model)


def remove_session(model: nn.Module, session: Session) -> None:
    """Give back the model as it was."""
    for name in _METHODS:
        model.__dict__.pop(name, None)
    session.undo.close()


def session_of(model: nn.Module) -> Session:
    """The session of a rewritten model.

    Raises:
        ValueError: no recipe is applied to it.
    """
    try:
        return SESSIONS[model]
    except KeyError:
        raise ValueError(
            f"this {type(model).__name__} is not rewritten; expected a model that a recipe was applied to"
            " (a copy of a rewritten model is not: apply to the copy of a restored one)"
        ) from None


def _register(model: nn.Module, session: Session) -> None:
    """Make the recipe's blocks part of the model, and the only part that learns."""
    if hasattr(model, ATTRIBUTE):
        raise ValueError(f"{type(model).__name__} has an attribute {ATTRIBUTE!r} already; expected an unmodified model")
    learning, this = [p for p in model.parameters() if p.requires_grad], weakref.ref(model)

    def unregister() -> None:
        delattr(this(), ATTRIBUTE)
        for p in learning:
            p.requires_grad_(True)

    model.add_module(ATTRIBUTE, session.blocks)
    session.undo.callback(unregister)
    for p in learning:
        p.requires_grad_(False)


def _in_place_of(own: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def outer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return outer


@can_return_tuple  # type: ignore[untyped-decorator]
def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if inside_torch_compile():
        raise RuntimeError(
            f"a recipe is applied to this {type(self).__name__}, and it was called behind torch.compile, which cannot"
            " look into it: use apply(..., backend='inductor') in its place, or vlmrewrite.restore(model) first"
        )
    session = session_of(self)
    prompt = kwargs.pop(ARGUMENT, None) or current_prompt((session, "forward")) or Prompt()
    return session.forward(self, prompt, args, kwargs)


def _generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with prompt_of(session_of(self), Prompt.of(args, kwargs)):
        return type(self).generate(self, *args, **kwargs)  # type: ignore[attr-defined]


def _prepare(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What generate gives to its next forward, and to no forward that others call meanwhile."""
    inputs = type(self).prepare_inputs_for_generation(self, *args, **kwargs)  # type: ignore[attr-defined]
    prompt = current_prompt(session_of(self))
    if prompt is None:
        return inputs
    prompt.see(kwargs.get("attention_mask"))
    return inputs | {ARGUMENT: prompt}


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy that says, when it is called, that it is not rewritten."""
    made = type(self).__new__(type(self))
    memo[id(self)] = made
    state = {name: x for name, x in vars(self).items() if name not in ("__deepcopy__", "__reduce_ex__")}
    vars(made).update(copy.deepcopy(state, memo))
    return made


def _refusing(what: str) -> Callable[..., Any]:
    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"a recipe is applied to this {type(self).__name__}, which {what}: call vlmrewrite.restore(model) first,"
            " and apply the recipe again afterwards"
        )

    return refuse


_METHODS: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "generate": _generate,
    "prepare_inputs_for_generation": _prepare,
    "set_attn_implementation": _refusing("runs vlmrewrite's attention while it is: its implementation cannot be set"),
    "__deepcopy__": _deepcopy,
    "__reduce_ex__": _refusing("cannot be pickled while it is (save_pretrained and state_dict can be used)"),
}
"""What stands on a rewritten model in place of its class's own."""
