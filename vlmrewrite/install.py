"""Applying a recipe to a model in place, and taking it back."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmrewrite import capture
from vlmrewrite.admission import admit
from vlmrewrite.blocks import ATTRIBUTE, build
from vlmrewrite.call import Call
from vlmrewrite.choice import Kernels, choose
from vlmrewrite.plan import FEATURES, Pass, Plan
from vlmrewrite.program import Program, say
from vlmrewrite.recipe import Recipe
from vlmrewrite.report import Report
from vlmrewrite.session import Backend, Session
from vlmrewrite.testing.edited import EditMask
from vlmrewrite.testing.oracle import BranchMask, LayerMasks, oracle_logits
from vlmrewrite.tokens import Selection, TokenSet, Vision, intersection

_SESSIONS: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


def apply(
    model: nn.Module,
    recipe: str | Path | Recipe | Pass | Sequence[Pass],
    *,
    backend: Backend = "auto",
    kernels: Kernels = "auto",
    strict: bool = False,
) -> nn.Module:
    """Rewrite a Hugging Face vision-language model in place.

    The model keeps its class, its ``generate()`` and the shapes of its outputs. Images are encoded as before; from the
    first call with an image on, the decoder runs as the recipe's passes say.

    Args:
        model: an unmodified model with ``get_image_features`` and a causal text decoder.
        recipe: name of a shipped recipe, path of a YAML file, :class:`Recipe`, or passes in order.
        backend: ``"eager"`` runs the rewritten graph as it is, ``"inductor"`` compiles it, ``"auto"`` compiles on a
            GPU, unless the recipe says which; it looks at where the model is when it is called.
        kernels: ``"reference"``, ``"triton"``, or ``"auto"``: what the recipe says, else the best there is.
        strict: raise when a pass is refused, instead of reporting it.

    Returns:
        the same model.

    Raises:
        ValueError: the recipe or the model cannot be used, or a recipe is applied already. The model is unchanged.
        TypeError: ``model`` is not a Hugging Face model.
        RuntimeError: kernels asked for by name cannot run here.
    """
    if isinstance(model, nn.Module) and model in _SESSIONS:
        raise ValueError(
            f"recipe {_SESSIONS[model].recipe.name!r} is applied to this {type(model).__name__} already; call"
            " vlmrewrite.restore(model) first"
        )
    chosen = Recipe.of(recipe)
    depth = admit(model)
    selected = _backend(chosen.backend if backend == "auto" else backend)
    picked: Kernels = chosen.kernels if kernels == "auto" else kernels
    choose(picked, next(model.parameters()).device)
    chosen = calibrate(model, chosen)
    try:
        plan, _ = say(Plan(depth, frozenset(FEATURES)), chosen.passes)
    except Exception as e:
        e.add_note(f"for a decoder of {depth} layers")
        raise
    session = Session(model, chosen, selected, picked, strict, plan, build(model, plan.blocks))
    try:
        _install(model, session)
    except BaseException:
        _undo(model, session)
        raise
    _SESSIONS[model] = session
    return model


def calibrate(model: nn.Module, recipe: str | Path | Recipe | Pass | Sequence[Pass], inputs: Any = None) -> Recipe:
    """A recipe whose passes have measured what they choose by: layers in place of budgets and of ``"auto"``.

    Args:
        model: an unmodified model.
        recipe: as for :func:`apply`.
        inputs: what the model's forward takes, with images, or a list of these; for passes without calibration inputs
            of their own.

    Returns:
        the same recipe, if no pass measures; else one that can be saved and applied without measuring again.

    Raises:
        ValueError: a pass has nothing to measure on, or what it has holds no image.
    """
    given = Recipe.of(recipe)
    passes = [p.calibrated(model, inputs) if hasattr(p, "calibrated") else p for p in given.passes]
    return given if passes == list(given.passes) else given.model_copy(update={"passes": tuple(passes)})


def _backend(backend: str) -> Backend:
    if backend not in ("auto", "eager", "inductor"):
        raise ValueError(f"backend={backend!r}; expected 'auto', 'eager' or 'inductor'")
    return backend  # type: ignore[return-value]


def _install(model: nn.Module, session: Session) -> None:
    capture.register()
    for config in capture.decoder_configs(model):
        before = config._attn_implementation_internal
        session.undo.append(functools.partial(setattr, config, "_attn_implementation_internal", before))
        config._attn_implementation_internal = capture.IMPLEMENTATION
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
    return _session(self).forward(self, *args, **kwargs)


def _generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Remember what does not reach ``forward``: the images' grids, and where the prompt ended.

    (Generation without a cache runs the growing sequence again and again.)
    """
    session = _session(self)
    before = session.prompt_end, session.thw
    session.prompt_end, session.thw = _prompt_end(args, kwargs), kwargs.get("image_grid_thw")
    try:
        return type(self).generate(self, *args, **kwargs)  # type: ignore[attr-defined]
    finally:
        session.prompt_end, session.thw = before


def _undo(model: nn.Module, session: Session) -> None:
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


def _session(model: nn.Module) -> Session:
    try:
        return _SESSIONS[model]
    except KeyError:
        raise ValueError(
            f"this {type(model).__name__} is not rewritten; expected a model that a recipe was applied to"
            " (a copy of a rewritten model is not: apply to the copy of a restored one)"
        ) from None


def restore(model: nn.Module) -> nn.Module:
    """Give back exactly the old model.

    Raises:
        ValueError: no recipe is applied to it.
    """
    _undo(model, _session(model))
    del _SESSIONS[model]
    return model


def applied_recipe(model: nn.Module) -> Recipe:
    """The recipe that is applied, calibrated passes with the layers they chose.

    Raises:
        ValueError: none is.
    """
    return _session(model).recipe


@contextlib.contextmanager
def applied(model: nn.Module, recipe: Any, **options: Any) -> Iterator[nn.Module]:
    """``apply``, and ``restore`` at the end of the block, whatever happens in it."""
    apply(model, recipe, **options)
    try:
        yield model
    finally:
        if model in _SESSIONS:
            restore(model)


def report(model: nn.Module, *, memory: bool = False) -> Report:
    """What was done to a model: passes matched and refused, costs per layer before and after, times.

    Args:
        model: a rewritten model.
        memory: also predict the peak memory of the last call with an image, by running its graph on fake tensors:
            about a second for 32 layers.

    Raises:
        ValueError: no recipe is applied to it; or memory is asked for and there was no call with an image yet.
    """
    return _session(model).report(model, memory)


def routing(model: nn.Module) -> Tensor:
    """What the chooser of a dispatch read in the last call with an image, with its gradient history: a router's scores.

    Raises:
        ValueError: no recipe is applied, there was no such call yet, or nothing is read in the graph.
    """
    session = _session(model)
    session.last()
    if session.latest is None or session.latest.ran.value is None:
        raise ValueError(f"recipe {session.recipe.name!r} chooses nothing by a value in the graph")
    return session.latest.ran.value


def last_call(model: nn.Module) -> tuple[Program, Call, dict[Selection, Tensor]]:
    """What ran in the last call with an image, the call, and what each selection chose in it, bool [F].

    Raises:
        ValueError: no recipe is applied, or there was no such call yet.
    """
    return _session(model).last()


@contextlib.contextmanager
def prompt_ends(model: nn.Module, column: Tensor) -> Iterator[None]:
    """While the block runs, the prompts of calls with images end there, as they do in ``generate()``.

    For training: the answers in ``input_ids`` are none of the prompt, by whose last token tokens and plans are chosen.

    Args:
        model: a rewritten model.
        column: of each row's last prompt token, int64 [B].

    Raises:
        ValueError: no recipe is applied.
    """
    session = _session(model)
    before, session.prompt_end = session.prompt_end, column
    try:
        yield
    finally:
        session.prompt_end = before


@dataclass(frozen=True)
class Stage:
    """Vision tokens that a run of layers works on: ``vision`` bool [B, T], in the logical sequence."""

    name: str
    layers: tuple[int, ...]
    vision: Tensor


def kept_tokens(model: nn.Module) -> list[Stage]:
    """Which vision tokens each layer ran on in the last call with an image.

    Raises:
        ValueError: no recipe is applied, or there was no such call yet.
    """
    program, call, chosen = _session(model).last()
    stages: dict[TokenSet, list[int]] = {}
    for entry in program.plan.layers:
        stages.setdefault(entry.run_set, []).append(entry.index)
    return [
        Stage(program.plan.render(s), tuple(layers), call.members(intersection(Vision, s), chosen))
        for s, layers in stages.items()
    ]


def layer_masks(model: nn.Module, total: int | None = None) -> list[LayerMasks]:
    """What each layer did in the last call with an image, for the oracle; tokens that came later belong to every set.

    Args:
        total: length of the logical sequence; default: that of the call.

    Raises:
        ValueError: no recipe is applied, or there was no such call yet.
    """
    program, call, chosen = _session(model).last()
    more = (total or call.length) - call.length

    def mask(s: TokenSet, later: bool = True) -> Tensor:
        return torch.nn.functional.pad(call.members(s, chosen), (0, more), value=later)

    def branches(layer: int) -> Iterator[BranchMask]:
        for b in program.plan.branches:
            if b.leave == layer:
                block = None if b.block is None else copy.deepcopy(program.blocks[b.block])
                yield BranchMask(mask(b.tokens, later=False), b.rejoin, block)

    facts: dict[str, Tensor | None] = {"lengths": call.lengths, "ordinal": call.ordinals}
    facts |= {"grid": call.grid, "encoder_features": call.encoder_features}

    def edits(layer: int) -> Iterator[EditMask]:
        for e in program.plan.edits:
            if e.at == layer:
                weights = tuple(program.blocks.get_parameter(name).detach().clone() for name in e.weights)
                tokens, last = call.members(e.tokens, chosen), call.last[:, 0]
                yield EditMask(tokens, e.op, e.needs, call.text, call.vision, last, facts, weights, e.options)

    return [
        LayerMasks(
            run=mask(e.run_set),
            keys=mask(e.keys),
            mlp=None if e.mlp_set is None else mask(e.mlp_set),
            edits=tuple(edits(e.index)),
            branches=tuple(branches(e.index)),
        )
        for e in program.plan.layers
    ]


def planned_lengths(model: nn.Module) -> list[int]:
    """Keys that each layer should have added to the cache in the last call with an image, by the plan alone."""
    program, call, _ = _session(model).last()
    return [call.census.size(entry.keys) for entry in program.plan.layers]


@torch.no_grad()
def verify(model: nn.Module, inputs: dict[str, Any], recipe: Any = None, **options: Any) -> float:
    """Run the oracle against the rewritten model.

    Args:
        model: an unmodified model; without ``recipe``, one that a recipe is applied to: its trained blocks are judged
            as they are, and the recipe stays applied.
        inputs: what the model's forward takes, with an image.
        recipe, options: as for :func:`apply`.

    Returns:
        the largest absolute difference of a logit at any token that is not padding.

    Raises:
        ValueError: there is no recipe, or the inputs hold no image.
        NotImplementedError: the model's attention, or what an edit needs, is nothing that the oracle knows.
    """
    if recipe is not None:
        with applied(model, recipe, **options):
            return verify(model, inputs)
    session = _session(model)
    before, session.latest = session.latest, None
    try:
        got = model(**inputs).logits
        masks = layer_masks(model)
    finally:
        session.latest = session.latest or before
    with _as_it_was(model):
        expected = oracle_logits(model, inputs, masks)[:, -got.shape[1] :]
    padding = inputs.get("attention_mask")
    error = (got - expected).abs().amax(-1)
    if isinstance(padding, Tensor) and padding.dim() == 2:
        error = error.masked_fill(~padding[:, -got.shape[1] :].bool(), 0.0)
    return float(error.max())


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """While the block runs, a rewritten model's forward is its class's own."""
    ours = model.__dict__.pop("forward")
    try:
        yield
    finally:
        model.__dict__["forward"] = ours
