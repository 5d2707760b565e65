"""A session's place on a model: its forward and generate, its blocks, its attention implementation."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmrewrite import capture, hf
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.runtime.session import Session

SESSIONS: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


def install_session(model: nn.Module, session: Session) -> None:
    """Put a session on a model; :func:`remove_session` takes it off, also after a failure half way."""
    capture.register()
    for config in hf.decoder_configs(model):
        before = config._attn_implementation_internal
        session.undo.append(functools.partial(setattr, config, "_attn_implementation_internal", before))
        config._attn_implementation_internal = hf.IMPLEMENTATION
    if "encoder_features" in session.wants:
        base = cast(nn.Module, model.base_model)
        encoder = cast(Callable[..., Any], base.get_image_features)
        base.__dict__["get_image_features"] = functools.wraps(encoder)(session.encoder.wrap(encoder))
        session.undo.append(lambda: base.__dict__.pop("get_image_features", None))
    if session.blocks:
        _register(model, session)
    for name, method in (("forward", _forward), ("generate", _generate)):
        model.__dict__[name] = types.MethodType(_in_place_of(getattr(type(model), name), method), model)


def _register(model: nn.Module, session: Session) -> None:
    """Make the recipe's blocks part of the model, and the only part that learns."""
    if hasattr(model, ATTRIBUTE):
        raise ValueError(f"{type(model).__name__} has an attribute {ATTRIBUTE!r} already; expected an unmodified model")
    learning = [p for p in model.parameters() if p.requires_grad]
    session.undo.append(lambda: [p.requires_grad_(True) for p in learning])
    for p in learning:
        p.requires_grad_(False)
    session.undo.append(lambda: delattr(model, ATTRIBUTE))
    model.add_module(ATTRIBUTE, session.blocks)


def _in_place_of(own: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(own)
    def outer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return method(self, *args, **kwargs)

    return outer


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return session_of(self).forward(self, *args, **kwargs)


def _generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Remember what does not reach ``forward``: the images' grids, and where the prompt ended.

    (Generation without a cache runs the growing sequence again and again.)
    """
    session = session_of(self)
    before = session.prompt_end, session.thw
    session.prompt_end, session.thw = _prompt_end(args, kwargs), kwargs.get("image_grid_thw")
    try:
        return type(self).generate(self, *args, **kwargs)  # type: ignore[attr-defined]
    finally:
        session.prompt_end, session.thw = before


def remove_session(model: nn.Module, session: Session) -> None:
    """Give back the model as it was."""
    for name in ("forward", "generate"):
        model.__dict__.pop(name, None)
    while session.undo:
        session.undo.pop()()


def _prompt_end(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Column of each row's last prompt token, for generation without a cache, where the sequence grows past it."""
    prompt = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs", kwargs.get("inputs_embeds")))
    if not isinstance(prompt, Tensor) or prompt.dim() < 2:
        return None
    mask = kwargs.get("attention_mask")
    columns = torch.arange(prompt.shape[1], device=prompt.device).expand(prompt.shape[0], -1)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == columns.shape:
        columns = columns * mask.to(columns)
    return columns.amax(1)


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
