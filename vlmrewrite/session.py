"""Applying a recipe to a model in place, running it, and taking it back."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.fx
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from vlmrewrite import capture
from vlmrewrite.admission import admit
from vlmrewrite.cache import PositionCache
from vlmrewrite.call import Call
from vlmrewrite.encode import Encoded, EncoderFeatures, encode_images, encoded_images
from vlmrewrite.lower import Kernels, Lowered, lower
from vlmrewrite.plan import Pass
from vlmrewrite.program import Program, program_of, rewrite
from vlmrewrite.recipe import Recipe
from vlmrewrite.tokens import All, TokenSet, Vision, intersection
from vlmrewrite.report import Report, make_report

Backend = Literal["auto", "eager", "inductor"]
_SESSIONS: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


@dataclass
class Installed:
    """One captured graph with the recipe applied: what runs."""

    program: Program
    lowered: Lowered
    run: Callable[..., Any]
    vision: torch.fx.GraphModule


class Graph:
    """One captured graph of a model; analysed once, rewritten once for each session."""

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self.gm = gm
        self._program: Program | None = None
        self._missing: tuple[str, ...] | None = None

    def program(self, missing: dict[str, str]) -> Program:
        if self._program is None or self._missing != tuple(missing):
            self._program, self._missing = program_of(self.gm, missing), tuple(missing)
        return self._program


class Traced:
    """A model behind Dynamo. Outlives a session, so that applying again need not capture again."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.call = capture.TracedCall(forward, self._new_graph)
        self.runner: Callable[[Graph, Sequence[Any]], Any] | None = None

    def _new_graph(self, gm: torch.fx.GraphModule) -> Callable[..., Any]:
        graph = Graph(gm)

        def run(*inputs: Any) -> Any:
            assert self.runner is not None
            return self.runner(graph, inputs)

        return run

    def run(
        self,
        runner: Callable[[Graph, Sequence[Any]], Any],
        model: nn.Module,
        cache: PositionCache,
        images: Encoded,
        kwargs: dict[str, Any],
    ) -> Any:
        """Run the captured forward; ``runner(graph, inputs)`` does the work of each graph."""
        before, self.runner = self.runner, runner
        try:
            return self.call(model, cache, images.features, images.as_list, kwargs)
        finally:
            self.runner = before


_TRACED: weakref.WeakKeyDictionary[nn.Module, Traced] = weakref.WeakKeyDictionary()


def traced(model: nn.Module) -> Traced:
    """The model's captures; new if its forward has been exchanged since."""
    forward = _own_forward(model)
    if model not in _TRACED or _TRACED[model].forward is not forward:
        _TRACED[model] = Traced(forward)
    return _TRACED[model]


def _own_forward(model: nn.Module) -> Callable[..., Any]:
    return type(model).forward


def tidy(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A forward's arguments by name, images encoded, and None in place of a mask without padding."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    for name in ("output_attentions", "output_hidden_states"):
        if kwargs.get(name):
            raise NotImplementedError(f"{name}=True is not available while a recipe is applied; restore the model first")
        kwargs.pop(name, None)
    kwargs = encode_images(model, kwargs)
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and bool(mask.all()):
        kwargs["attention_mask"] = None
    return kwargs


class Session:
    """A recipe applied to a model."""

    def __init__(
        self, model: nn.Module, recipe: Recipe, backend: Backend, kernels: Kernels, strict: bool
    ) -> None:
        self.recipe, self.backend, self.kernels, self.strict = recipe, backend, kernels, strict
        self.passes: list[Pass] = list(recipe.passes)
        self.installed: dict[Graph, Installed] = {}
        self.latest: tuple[Installed, Call] | None = None
        self.chosen: tuple[Tensor, ...] = ()
        self.plain_calls = 0
        self.prompt_end: Tensor | None = None
        self._encoded: Encoded | None = None
        self._call: dict[str, Any] = {}
        self.undo: list[Callable[[], Any]] = []
        self.encoder = EncoderFeatures(weakref.proxy(model))
        self.wants_encoder = any(getattr(p, "features", None) == "encoder" for p in self.passes)

    # ---- one forward

    def forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The model's forward under this recipe; same arguments and outputs."""
        kwargs = tidy(model, args, kwargs)
        return_dict = kwargs.pop("return_dict", None)
        return_dict = model.config.return_dict if return_dict is None else return_dict  # type: ignore[union-attr]
        cache, keep = self._cache(model, kwargs.pop("past_key_values", None), kwargs.pop("use_cache", None))
        output = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if output is None:
            self.plain_calls += 1
            own = traced(model).forward
            with capture.running(cache if keep else None):
                out = own(model, past_key_values=cache if keep else None, use_cache=keep, return_dict=True, **kwargs)
        else:
            kwargs.pop("mm_encoder_outputs")
            out = self._rewritten(model, cache, encoded_images(output), kwargs)
            if not keep:
                out.pop("past_key_values", None)
        assert isinstance(out, ModelOutput)
        return out if return_dict else out.to_tuple()

    def _cache(self, model: nn.Module, given: Any, use_cache: bool | None) -> tuple[PositionCache, bool]:
        if isinstance(given, PositionCache):
            return given, True
        if given is None:
            default = getattr(model.config.get_text_config(), "use_cache", True)  # type: ignore[union-attr, operator]
            return PositionCache(), bool(default if use_cache is None else use_cache)
        if not isinstance(given, Cache):
            raise TypeError(f"past_key_values is a {type(given).__name__}; expected a transformers Cache")
        if given.is_compileable:
            raise NotImplementedError(
                f"{type(given).__name__} has a fixed length; a rewritten model keeps a different length in each layer."
                " Remove cache_implementation from the generation config"
            )
        if given.get_seq_length() > 0:
            raise ValueError(
                f"past_key_values holds {given.get_seq_length()} tokens that went through the unmodified model;"
                " start again with an empty cache"
            )
        return PositionCache(), True

    def _rewritten(self, model: nn.Module, cache: PositionCache, images: Encoded, kwargs: dict[str, Any]) -> Any:
        self._encoded, self._call = images, {"mask": kwargs.get("attention_mask"), "past": cache.get_seq_length()}
        one = traced(model)
        before = one.call.graphs
        out = one.run(self._run, model, cache, images, kwargs)
        if one.call.graphs > before and one.call.graphs >= one.call.limit - 2:
            warnings.warn(
                f"{one.call.graphs} graphs of {type(model).__name__} were captured; Dynamo stops at"
                f" {one.call.limit} (torch._dynamo.config.recompile_limit)",
                stacklevel=3,
            )
        assert self.latest is not None
        installed, call = self.latest
        for layer, entry in zip(cache.layers, installed.program.plan.layers, strict=False):
            layer.holes = layer.holes or (entry.keys != All and not call.census.dense(entry.keys))
        return out

    def _run(self, graph: Graph, inputs: Sequence[Any]) -> Any:
        installed = self._install(graph)
        call = self._describe(installed, inputs)
        out, self.chosen = installed.run(*installed.program.arguments(inputs, call))
        self.latest = (installed, call)
        return out

    def _install(self, graph: Graph) -> Installed:
        if graph not in self.installed:
            missing = {} if self.wants_encoder and self.encoder.missing is None else {
                "encoder_features": self.encoder.missing or "no pass asked for them"
            }  # fmt: skip
            base = graph.program(missing)
            program = rewrite(base, self.passes, strict=self.strict)
            lowered = lower(program.graph_module, self.kernels)
            run: Callable[..., Any] = lowered.graph_module
            if self.backend == "inductor":
                run = torch.compile(lowered.graph_module, backend="inductor", dynamic=True)
            self.installed[graph] = Installed(program, lowered, run, base.vision_mask())
        return self.installed[graph]

    def _describe(self, installed: Installed, inputs: Sequence[Any]) -> Call:
        assert self._encoded is not None
        vision = installed.vision(*inputs)
        mask = self._call["mask"]
        padding = mask[:, -vision.shape[1] :].bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        encoder = self.encoder.of(self._encoded) if self.wants_encoder and self.encoder.missing is None else None
        end = self.prompt_end
        if end is not None and (self._call["past"] or len(vision) % len(end)):
            end = None
        elif end is not None:
            end = end.repeat_interleave(len(vision) // len(end))
        return Call(vision, padding, self._encoded.lengths, self._call["past"], end, encoder)


def apply(
    model: nn.Module,
    recipe: str | Path | Recipe | Pass | Sequence[Pass],
    *,
    backend: Backend | None = None,
    kernels: Kernels | None = None,
    strict: bool = False,
) -> nn.Module:
    """Rewrite a Hugging Face vision-language model in place.

    The model keeps its class, its ``generate()`` and the shapes of its outputs. Images are encoded as before; from the
    first call with an image on, the decoder runs as the recipe's passes say.

    Args:
        model: an unmodified model with ``get_image_features`` and a causal text decoder.
        recipe: name of a shipped recipe, path of a YAML file, :class:`Recipe`, or passes in order.
        backend: ``"eager"`` runs the rewritten graph as it is, ``"inductor"`` compiles it, ``"auto"`` compiles on a
            GPU. Default: what the recipe says.
        kernels: ``"reference"``, ``"triton"`` or ``"auto"``. Default: what the recipe says.
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
    selected = _backend(backend or chosen.backend, model)
    for p in chosen.passes:
        _rehearse(p, depth)
    picked: Kernels = kernels or chosen.kernels
    lower(torch.fx.GraphModule({}, _empty()), picked)
    session = Session(model, chosen, selected, picked, strict)
    saved = [(c, c._attn_implementation_internal) for c in capture.decoder_configs(model)]
    try:
        capture.register()
        for config, _ in saved:
            config._attn_implementation_internal = capture.IMPLEMENTATION
        session.undo = [lambda c=c, v=v: setattr(c, "_attn_implementation_internal", v) for c, v in saved]
        _install(model, session)
    except BaseException:
        for config, value in saved:
            config._attn_implementation_internal = value
        for name in ("forward", "generate"):
            model.__dict__.pop(name, None)
        _SESSIONS.pop(model, None)
        raise
    return model


def _rehearse(p: Pass, depth: int) -> None:
    """Let a pass speak to an empty plan, so that a layer out of range is an error now and not at the first call."""
    from vlmrewrite.plan import Plan

    plan = Plan(depth, frozenset({"features", "encoder_features"}))
    try:
        if p.refuse(plan) is None:
            p.change(plan)
            plan.check()
    except Exception as e:
        e.add_note(f"in pass {p!r}, for a decoder of {depth} layers")
        raise


def _empty() -> torch.fx.Graph:
    graph = torch.fx.Graph()
    graph.output(())
    return graph


def _backend(backend: str, model: nn.Module) -> Backend:
    if backend not in ("auto", "eager", "inductor"):
        raise ValueError(f"backend={backend!r}; expected 'auto', 'eager' or 'inductor'")
    if backend == "auto":
        return "inductor" if next(model.parameters()).device.type == "cuda" else "eager"
    return backend  # type: ignore[return-value]


def _install(model: nn.Module, session: Session) -> None:
    own = type(model).forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _session(self).forward(self, *args, **kwargs)

    generate = type(model).generate  # type: ignore[attr-defined]

    @functools.wraps(generate)
    def generate_remembering_the_prompt(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        session = _session(self)
        before, session.prompt_end = session.prompt_end, _prompt_end(args, kwargs)
        try:
            return generate(self, *args, **kwargs)
        finally:
            session.prompt_end = before

    model.__dict__["forward"] = types.MethodType(forward, model)
    model.__dict__["generate"] = types.MethodType(generate_remembering_the_prompt, model)
    if session.wants_encoder:
        base = model.base_model
        encoder = session.encoder.wrap(base.get_image_features)  # type: ignore[union-attr, arg-type]
        functools.update_wrapper(encoder, base.get_image_features)  # type: ignore[union-attr, arg-type]
        base.__dict__["get_image_features"] = encoder  # type: ignore[union-attr]
        session.undo.append(lambda: base.__dict__.pop("get_image_features", None))  # type: ignore[union-attr]
    _SESSIONS[model] = session


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
    session = _session(model)
    for name in ("forward", "generate"):
        model.__dict__.pop(name, None)
    for undo in session.undo:
        undo()
    del _SESSIONS[model]
    return model


@contextlib.contextmanager
def applied(model: nn.Module, recipe: Any, **options: Any) -> Iterator[nn.Module]:
    """``apply``, and ``restore`` at the end of the block, whatever happens in it."""
    apply(model, recipe, **options)
    try:
        yield model
    finally:
        if model in _SESSIONS:
            restore(model)


def report(model: nn.Module) -> Report:
    """What was done to a model: passes matched and refused, costs per layer before and after, times.

    Raises:
        ValueError: no recipe is applied to it.
    """
    session = _session(model)
    return make_report(session, _TRACED.get(model))


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
    session = _session(model)
    if session.latest is None:
        raise ValueError("no call with an image was made since the recipe was applied")
    installed, call = session.latest
    program = installed.program
    assert program.rewritten is not None
    chosen = dict(zip(program.rewritten.selections, session.chosen, strict=True))
    stages: dict[TokenSet, list[int]] = {}
    for entry in program.plan.layers:
        stages.setdefault(entry.run_set, []).append(entry.index)
    return [
        Stage(program.plan.render(s), tuple(layers), call.members(intersection(Vision, s), chosen))
        for s, layers in stages.items()
    ]


@contextlib.contextmanager
def _tracing(model: nn.Module) -> Iterator[None]:
    admit(model)
    capture.register()
    with capture.attention_swapped(model):
        yield


def trace(model: nn.Module, inputs: dict[str, Any]) -> Program:
    """Capture a model's forward for some inputs; nothing is installed, and the decoder is not run.

    Args:
        model: an unmodified model, on any device (the meta device too).
        inputs: what the model's forward takes, with an image.

    Raises:
        ValueError: the inputs hold no image, or the graph could not be recognised.
    """
    class Captured(Exception):
        pass

    found: list[tuple[Graph, Sequence[Any]]] = []

    def runner(graph: Graph, flat: Sequence[Any]) -> Any:
        found.append((graph, tuple(flat)))
        raise Captured

    if model in _SESSIONS:
        raise ValueError(f"a recipe is applied to this {type(model).__name__}; call vlmrewrite.restore(model) first")
    with _tracing(model), torch.no_grad():
        kwargs = tidy(model, (), dict(inputs))
        output = (kwargs.pop("mm_encoder_outputs", None) or {}).get("image")
        if output is None:
            raise ValueError(f"the inputs hold no image: {', '.join(inputs)}; expected pixel_values or the like")
        for name in ("past_key_values", "use_cache", "return_dict"):
            kwargs.pop(name, None)
        images = encoded_images(output)
        with contextlib.suppress(Captured):
            traced(model).run(runner, model, PositionCache(), images, kwargs)
        graph, flat = found[0]
        program = graph.program({"encoder_features": "a traced program does not hold them"})
        mask = kwargs.get("attention_mask")
        vision = program.vision_mask()(*flat)
        padding = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
        call = None if vision.is_meta else Call(vision, padding, images.lengths)
    from dataclasses import replace

    return replace(program, call=call, inputs=tuple(flat))
