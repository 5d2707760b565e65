"""The public calls: apply a recipe to a model in place, look at what it does, take it back."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import nn

from vlmrewrite.compat import Apart
from vlmrewrite.errors import noted, shown
from vlmrewrite.hf import (
    APPLIED,
    base_model_of,
    check_support,
    device_of,
    elsewhere,
    language_model,
    on_base_model,
    refuse_one_size,
)
from vlmrewrite.ops import Backend, Kernels, choose
from vlmrewrite.oracle import verify_applied
from vlmrewrite.plan import FEATURES, Pass, Plan, build, run_passes
from vlmrewrite.recipe import Recipe
from vlmrewrite.report import Report, report_on
from vlmrewrite.runtime import SESSIONS, Session, install_session, remove_session, session_of
from vlmrewrite.saving import METHODS, Stored, named_folder, put_blocks, read, refuse_other

_PROCESSOR_SET: ContextVar[bool] = ContextVar("vlmrewrite_processor_set", default=False)


def apply(
    model: nn.Module,
    recipe: str | os.PathLike[str] | Recipe | Pass | Sequence[Pass],
    *,
    backend: Backend = "auto",
    kernels: Kernels = "auto",
    strict: bool = False,
    calibration: Any = None,
    budget: str | Mapping[str, float] | None = None,
) -> nn.Module:
    """Rewrite a Hugging Face vision-language model in place.

    The model keeps its class, its ``generate()`` and the shapes of its outputs. Images are encoded as before; from the
    first call with an image on, the decoder runs as the recipe's passes say.

    Args:
        model: an unmodified model with ``get_image_features`` and a causal text decoder; or a pipeline of transformers
            with such a model, whose processor is set too, if the recipe says how.
        recipe: name of a shipped recipe, path of a YAML file, :class:`Recipe`, or passes in order; or a folder that
            ``save_pretrained`` or :func:`vlmrewrite.save_blocks` of a rewritten model has written to, or a repository
            of the Hub that holds the same files (``"owner/name"``): its blocks are put in place too. ``"auto"``: what
            a search finds on ``calibration`` for ``budget``, which takes minutes; see :func:`vlmrewrite.tune`.
        backend: ``"eager"`` runs the rewritten graph as it is, ``"inductor"`` compiles it, each kind of layer once and
            called for all that are like it, ``"inductor-whole"`` compiles it as one piece, which takes longer the
            deeper the model is. ``"auto"`` is ``"inductor"`` on a GPU, unless the recipe says which; it looks at where
            the model is when it is called.
        kernels: ``"reference"``, ``"triton"``, or ``"auto"``: what the recipe says, else the best there is.
        strict: raise when a pass is refused, instead of reporting it.
        calibration: for ``"auto"``: ``(processor, data)``, with data as for :func:`vlmrewrite.evaluate`, by whose
            metric a recipe is judged; or what the model's forward takes, with images, or a list of these, by which it
            is judged by the KL of the first token.
        budget: for ``"auto"``, as for :func:`vlmrewrite.tune`; None is ``{"flops": 0.5}``.

    Returns:
        the same model.

    Warns:
        UserWarning: inputs have to be made by ``recipe.processor(processor)``, and ``model`` is no pipeline.

    Raises:
        ValueError: the recipe, the blocks or the model cannot be used, or a recipe is applied already; or a pipeline's
            processor cannot be set as the recipe says. The model is unchanged.
        FileNotFoundError: there is no such file, folder or repository.
        TypeError: ``model`` is not a Hugging Face model.
        RuntimeError: kernels asked for by name cannot run here.
    """
    given: Any = model
    model = base_model_of(model)
    if isinstance(model, nn.Module) and model in SESSIONS:
        raise ValueError(
            f"recipe {SESSIONS[model].recipe.name!r} is applied to this {type(model).__name__} already; call"
            " vlmrewrite.restore(model) first"
        )
    if recipe == "auto":  # by name, for the search stands on this
        recipe = importlib.import_module("vlmrewrite.tune").automatic(model, calibration, budget)
    elif calibration is not None or budget is not None:
        raise ValueError(f"expected calibration and budget with the recipe 'auto' alone, got {shown(recipe)}")
    if named_folder(recipe):
        return apply_stored(given, read(recipe), backend=backend, kernels=kernels, strict=strict)  # type: ignore[arg-type]
    chosen = Recipe.of(recipe)
    depth = check_support(model, offloaded=True)
    selected = _backend(chosen.backend if backend == "auto" else backend)
    picked: Kernels = chosen.kernels if kernels == "auto" else kernels
    choose(picked, device_of(model))
    chosen.check_layers(depth)
    chosen = calibrate(model, chosen)
    with noted(lambda _: [f"for a decoder of {depth} layers" + (f", from {chosen.source}" if chosen.source else "")]):
        plan, _ = run_passes(Plan(depth, frozenset(FEATURES)), chosen.passes)
    inner = language_model(model) is not None
    if plan.blocks and elsewhere(model):
        raise ValueError(
            f"recipe {chosen.name!r} has blocks ({', '.join(plan.blocks)}), and this {type(model).__name__} is"
            " offloaded or on several devices: expected a recipe without blocks, or a model that is on one device"
        )
    blocks = Apart(build(model, plan.blocks)) if plan.blocks else None
    own = None if isinstance(given, nn.Module) else getattr(given, "processor", None)
    if own is not None and chosen.sets_processor:
        refuse_one_size(model, own, made := chosen.processor(own))
    install_session(model, Session(chosen, selected, picked, strict, plan, blocks, inner), METHODS)
    if own is not None and chosen.sets_processor:
        vars(model)[APPLIED].callback(setattr, given, "processor", own)
        given.processor = made
    elif chosen.sets_processor and not _PROCESSOR_SET.get():
        warnings.warn(
            f"recipe {chosen.name!r} makes pictures smaller by way of the processor, which apply does not see: make the"
            " inputs with recipe.processor(processor), where recipe is vlmrewrite.Recipe.of(...)",
            stacklevel=2,
        )
    return given  # type: ignore[no-any-return]


@contextlib.contextmanager
def processor_set() -> Iterator[None]:
    """While the block runs, :func:`apply` does not say that inputs have to be made in another way: they are."""
    token = _PROCESSOR_SET.set(True)
    try:
        yield
    finally:
        _PROCESSOR_SET.reset(token)


def apply_stored(model: nn.Module, stored: Stored, **options: Any) -> nn.Module:
    """Apply a recipe that was saved, with its blocks.

    Raises:
        ValueError: it belongs to another model, or as for :func:`apply`; the model is unchanged.
    """
    base = base_model_of(model)
    refuse_other(base, stored)
    apply(model, stored.recipe, **options)
    try:
        put_blocks(base, stored)
    except BaseException:
        restore(model)
        raise
    return model


@on_base_model
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
    if backend not in ("auto", "eager", "inductor", "inductor-whole"):
        raise ValueError(f"backend={backend!r}; expected 'auto', 'eager', 'inductor' or 'inductor-whole'")
    return backend  # type: ignore[return-value]


@on_base_model
def restore(model: nn.Module) -> nn.Module:
    """Give back exactly the old model.

    Raises:
        ValueError: no recipe is applied to it.
    """
    session_of(model)
    remove_session(model)
    return model


@on_base_model
def applied_recipe(model: nn.Module) -> Recipe:
    """The recipe that is applied, calibrated passes with the layers they chose.

    Raises:
        ValueError: none is.
    """
    return session_of(model).recipe


@contextlib.contextmanager
def applied(model: nn.Module, recipe: Any, **options: Any) -> Iterator[nn.Module]:
    """``apply``, and ``restore`` at the end of the block, whatever happens in it."""
    apply(model, recipe, **options)
    try:
        yield model
    finally:
        if base_model_of(model) in SESSIONS:
            restore(model)


@contextlib.contextmanager
def resumed(model: nn.Module, session: Session) -> Iterator[nn.Module]:
    """While the block runs, a session that an earlier ``apply`` made is at work again, with all that it has compiled.

    Args:
        model: the unmodified model that it was made for, without a wrapper.
        session: as ``session_of`` gave it while it was applied.
    """
    install_session(model, session, METHODS)
    try:
        yield model
    finally:
        remove_session(model)


@on_base_model
def report(model: nn.Module, *, memory: bool = False) -> Report:
    """What was done to a model: passes matched and refused, costs per layer before and after, times.

    Costs are those of the last call with an image; of which, if threads made several, :func:`kept_tokens` says.

    Args:
        model: a rewritten model.
        memory: also predict the peak memory of the last call with an image, by running its graph on fake tensors:
            about a second for 32 layers.

    Raises:
        ValueError: no recipe is applied to it; or memory is asked for and there was no call with an image yet.
    """
    return report_on(model, session_of(model), memory)


@on_base_model
def verify(
    model: nn.Module, inputs: dict[str, Any], recipe: Any = None, *, strict: bool = True, **options: Any
) -> float:
    """Run the oracle against the rewritten model.

    Args:
        model: an unmodified model; without ``recipe``, one that a recipe is applied to: its trained blocks are judged
            as they are, and the recipe stays applied.
        inputs: what the model's forward takes, with an image.
        recipe, options: as for :func:`apply`.
        strict: raise when a pass is refused, for it has done nothing that could be judged; False: judge the
            others. One whose ``change`` says nothing to the plan is refused; one that says to keep all (``keep=1.0``)
            is not.

    Returns:
        the largest absolute difference of a logit at any token that is not padding.

    Raises:
        ValueError: there is no recipe, the inputs hold no image, or a pass was refused; or there are options and no
            recipe to apply with them.
        NotImplementedError: the model's attention, or what an edit needs, is nothing that the oracle knows.
    """
    if recipe is not None:
        with applied(model, recipe, strict=strict, **options):
            return verify(model, inputs, strict=strict)
    if options:
        raise ValueError(f"expected {', '.join(options)} with a recipe to apply, got no recipe")
    session = session_of(model)
    error = verify_applied(model, inputs)
    refused = [f"{o.configuration} was refused: {o.reason}" for o in session.last().program.outcomes if o.reason]
    if strict and refused:
        raise ValueError(f"{'; '.join(refused)} (strict=False judges the other passes)")
    return error
