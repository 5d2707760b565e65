"""A session's place on a model: its forward and generate, its blocks, its attention implementation; what it tells.

Which call is the last one in a process with several threads, :func:`kept_tokens` says.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import StaticCache
from transformers.utils.generic import can_return_tuple

from vlmrewrite import capture, hf
from vlmrewrite.compat import inside_torch_compile
from vlmrewrite.hf import APPLIED, MODALITIES, Undo, drop, on_base_model, swap_attention, watched
from vlmrewrite.kvcache import adopt
from vlmrewrite.ops import swap_mixers
from vlmrewrite.plan import ATTRIBUTE, Call, Selection
from vlmrewrite.rewrite import Program
from vlmrewrite.runtime.around import refuse_unrewritten
from vlmrewrite.runtime.below import behind_compile, in_place, put_below
from vlmrewrite.runtime.facts import ARGUMENT, Prompt, Stage, current_prompt, prompt_of
from vlmrewrite.runtime.session import SESSIONS, Session, session_of


def install_session(
    model: nn.Module, session: Session, methods: Mapping[str, Callable[..., Any]] = MappingProxyType({})
) -> None:
    """Put a session on a model; :func:`remove_session` takes it off. A failure half way leaves the model as it was.

    Args:
        methods: more to stand in place of the class's own, by name.
    """
    capture.register()
    with Undo(model) as undo:
        undo.callback(swap_attention(model))
        undo.callback(swap_mixers(model))
        if "encoder_features" in session.plan.needs():
            for name, encoder in _encoders(model):
                undo.put(model.base_model, name, watched(model, encoder, session.encoded))  # type: ignore[arg-type]
        if session.blocks is not None:
            _register(undo, model, session.blocks)
        generating: Any = hf.language_model(model) or model
        undo.put(generating, _PREPARE, _prepared(session, getattr(generating, _PREPARE)))
        if generating is not model:
            generate = in_place(type(generating).generate, _generate_inside(session))
            undo.put(generating, "generate", types.MethodType(generate, generating))
        put_below(undo, model, session)
        for name, method in {**_METHODS, **methods}.items():
            made = types.MethodType(in_place(getattr(type(model), name, method), method), model)
            if name == "forward":
                hf.put_forward(undo, model, made)
            else:
                undo.put(model, name, made)
        undo.callback(drop, model, APPLIED)
        vars(model)[APPLIED] = undo
        SESSIONS[model] = session


def _encoders(model: nn.Module) -> list[tuple[str, Callable[..., Any]]]:
    """The methods that encode images and videos, by name."""
    names = [f"get_{modality}_features" for modality in MODALITIES]
    return [(n, getattr(model.base_model, n)) for n in names if hasattr(model.base_model, n)]


def remove_session(model: nn.Module) -> None:
    """Give back the model as it was."""
    vars(model)[APPLIED].close()
    del SESSIONS[model]


@on_base_model
def routing(model: nn.Module) -> Tensor:
    """What the chooser of a dispatch read in the last call with an image, with its gradient history: a router's scores.

    Raises:
        ValueError: no recipe is applied, there was no such call yet, or nothing is read in the graph.
    """
    session = session_of(model)
    value = session.last().result.value
    if value is None:
        raise ValueError(f"recipe {session.recipe.name!r} chooses nothing by a value in the graph")
    return value


@on_base_model
def last_call(model: nn.Module) -> tuple[Program, Call, dict[Selection, Tensor]]:
    """What ran in the last call with an image, the call, and what each selection chose in it, bool [F].

    Of a dispatch, the program of the most demanding plan that a row followed; see :attr:`LastCall.followed`.

    Raises:
        ValueError: no recipe is applied, or there was no such call yet.
    """
    ran = session_of(model).last()
    return ran.program, ran.call, ran.result.chosen


@on_base_model
def kept_tokens(model: nn.Module) -> list[Stage]:
    """Which vision tokens each layer ran on in the last call with an image, whichever plan a row followed.

    Of several threads, the one that asks is told of its own last call, or of a newer one by a thread that was started
    after that call (as for a streamer), never of one by a thread that ran beside it already: there, ask in the thread
    that made the call. A thread that made no call is told of the newest of all.

    Raises:
        ValueError: no recipe is applied, or there was no such call yet.
    """
    return session_of(model).last().stages()


def _register(undo: Undo, model: nn.Module, blocks: nn.Module) -> None:
    """Make the recipe's blocks part of the model, and the only part that learns, if nobody has chosen others."""
    if hasattr(model, ATTRIBUTE):
        raise ValueError(f"{type(model).__name__} has an attribute {ATTRIBUTE!r} already; expected an unmodified model")
    if not hf.chosen(map(model.get_submodule, hf.decoder_layers(model))):
        undo.frozen = [p for p in model.parameters() if p.requires_grad]
        model.requires_grad_(False)
    model.add_module(ATTRIBUTE, blocks)
    undo.callback(delattr, model, ATTRIBUTE)


@can_return_tuple  # type: ignore[untyped-decorator]
def _own(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    session = session_of(self)
    prompt = kwargs.pop(ARGUMENT, None) or current_prompt((session, "forward")) or Prompt()
    return session.forward(self, prompt, args, kwargs)


def _forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    if inside_torch_compile():
        return behind_compile(None, _own, self, *args, **kwargs)
    return _own(self, *args, **kwargs)


def _generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    session, generate = session_of(self), type(self).generate  # type: ignore[attr-defined]
    hf.refuse_implementation(self, args, kwargs)
    prompt = Prompt(sizes=hf.Sizes.of(kwargs)) if session.inner else Prompt.of(args, kwargs)
    prompt.follows = (current_prompt((session, "forward")) or prompt).follows
    try:
        with prompt_of(session, prompt), session.around(self, prompt) if session.inner else nullcontext():
            out = generate(self, *args, **kwargs)
    except BaseException:
        for cache, before in prompt.adopted:
            cache.__class__, cache.__dict__ = before
        raise
    given = hf.images_of(inspect.signature(generate).bind_partial(self, *args, **kwargs).arguments | kwargs)
    refuse_unrewritten(self, "generate", given, prompt)
    return out


def _generate_inside(session: Session) -> Callable[..., Any]:
    """That of a decoder which the model's ``generate`` hands over to."""

    def generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if (prompt := current_prompt(session)) is not None:
            made = Prompt.of(args, kwargs)
            prompt.end, prompt.columns = made.end, made.columns
        return type(self).generate(self, *args, **kwargs)  # type: ignore[attr-defined]

    return generate


def _prepared(session: Session, own: Callable[..., Any]) -> Callable[..., Any]:
    """What generate gives to its next forward, and to no forward that others call meanwhile."""

    @functools.wraps(own)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        cache, prompt = kwargs.get("past_key_values"), current_prompt(session)
        if prompt is None:
            return own(*args, **kwargs)
        if isinstance(cache, StaticCache):  # for which masks of another form would be made
            prompt.adopted.append((cache, adopt(cache, own.__self__)))  # type: ignore[attr-defined]
        inputs = own(*args, **kwargs)
        prompt.see(kwargs.get("attention_mask"))
        return inputs | {ARGUMENT: prompt}

    return prepare


def _refusing(what: str, generate_may: bool = False) -> Callable[..., Any]:
    """A method that raises; where ``generate_may`` is set, it does nothing when ``generate`` calls it."""

    def refuse(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not (generate_may and current_prompt(session_of(self))):
            raise ValueError(
                f"a recipe is applied to this {type(self).__name__}, which {what}: call vlmrewrite.restore(model)"
                " first, and apply the recipe again afterwards"
            )

    return refuse


_PREPARE = "prepare_inputs_for_generation"

_METHODS: dict[str, Callable[..., Any]] = {
    "forward": _forward,
    "generate": _generate,
    "set_attn_implementation": _refusing("runs vlmrewrite's attention while it is: its implementation cannot be set"),
    "init_continuous_batching": _refusing("keeps a cache for each call: continuous batching shares one among requests"),
    # by transformers' own, which on a GPU asks for others while it decodes: vlmrewrite's run all the same
    "set_experts_implementation": _refusing("runs vlmrewrite's experts while it is: no other can be set", True),
}
"""What stands on a rewritten model in place of its class's own."""
