"""A recipe at work on a model: what happens in one forward. What a call knows is its own, never the session's."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from vlmrewrite import capture
from vlmrewrite.capture import Graph, captures_of
from vlmrewrite.compat import inductor
from vlmrewrite.compiler import compile
from vlmrewrite.hf import Encoding, refuse_packed, tidy, wants_cache, without_full_mask
from vlmrewrite.kvcache import PositionCache, adopted
from vlmrewrite.lower import DecodeStep, Executable, lower, positioned
from vlmrewrite.ops import Backend, Kernels, choose, resolve
from vlmrewrite.plan import All, Pass, Plan
from vlmrewrite.recipe import Recipe
from vlmrewrite.runtime.facts import Given, LastCall, Latest, Layout, Prompt, Tally, current_prompt, prompt_of
from vlmrewrite.runtime.programs import graph_program, vision_mask


class Session:
    """A recipe applied to a model."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        backend: Backend,
        kernels: Kernels,
        strict: bool,
        plan: Plan,
        blocks: nn.ModuleDict,
    ) -> None:
        self.recipe, self.backend, self.kernels, self.strict = recipe, backend, kernels, strict
        self.passes: list[Pass] = list(recipe.passes)
        self.blocks = blocks
        self.executables: dict[tuple[Graph, frozenset[str], torch.device], Executable] = {}
        self.latest = Latest()
        self.text_calls, self.compiled_calls = Tally(), Tally()
        self.undo = ExitStack()
        self._thread = threading.local()
        self.wants = plan.needs()
        self.judges_logits, self.reads_last = plan.judges_logits, plan.reads_last
        self.config: Any = model.config
        self._lock = threading.RLock()
        self._warned: set[str] = set()

    def last(self) -> LastCall:
        """The last call with an image.

        Raises:
            ValueError: there was none yet.
        """
        latest = self.latest.get()
        if latest is None:
            raise ValueError("no call with an image was made since the recipe was applied")
        return latest

    def encoded(self, encoding: Encoding) -> None:
        """Keep a run of the vision tower: with the generation or forward that made it, else as the thread's last."""
        prompt = current_prompt(self)
        if prompt is None:
            self._thread.encodings = [encoding]
        else:
            prompt.encodings.append(encoding)

    def forward(self, model: nn.Module, prompt: Prompt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward under this recipe; its arguments and outputs."""
        if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            raise NotImplementedError(
                "gradient checkpointing is on, and the rewritten graph keeps its activations: call"
                " model.gradient_checkpointing_disable()"
            )
        own = Prompt()
        with prompt_of(self, own):
            kwargs = tidy(model, args, kwargs)
        encodings = own.encodings + prompt.encodings + getattr(self._thread, "encodings", [])
        return_dict = kwargs.pop("return_dict", None)
        return_dict = model.config.return_dict if return_dict is None else return_dict  # type: ignore[union-attr]
        past, use_cache = kwargs.pop("past_key_values", None), kwargs.pop("use_cache", None)
        with adopted(past) as cache:
            keep = past is not None or wants_cache(model, use_cache)
            given, rest = Given.of(kwargs, cache, prompt, encodings)
            if given is None:
                out = self._text(model, cache if keep else None, rest)
            else:
                if not keep:
                    refuse_packed(kwargs)
                out = self._with_images(model, cache, given, rest)
                if not keep:
                    out = type(out)(**{k: v for k, v in out.items() if k != "past_key_values"})
        assert isinstance(out, ModelOutput)
        return out if return_dict else out.to_tuple()

    def _text(self, model: nn.Module, cache: PositionCache | None, kwargs: dict[str, Any]) -> Any:
        """A call without an image: nothing is dropped, and what the cache holds is what each layer sees."""
        self.text_calls.add()
        one, keep, device = captures_of(model), cache is not None, next(model.parameters()).device
        if cache is not None:
            kwargs = without_full_mask(kwargs)
            if resolve(self.backend, device) == "inductor":
                self.compiled_calls.add()
                return _compiled_text(model, cache, kwargs, self.kernels)
        kernels = self.kernels if choose(self.kernels, device).kernel == "triton" else None
        with capture.running(cache, kernels):
            return one.forward(model, past_key_values=cache, use_cache=keep, return_dict=True, **kwargs)

    def _with_images(self, model: nn.Module, cache: PositionCache, given: Given, kwargs: dict[str, Any]) -> Any:
        keep = kwargs.get("logits_to_keep")
        if self.judges_logits and isinstance(keep, int) and keep and not _at_the_end(kwargs, given, keep):
            kwargs = kwargs | {"logits_to_keep": 0}
        one = captures_of(model)
        before = len(one.call.graphs)
        out = one.call(functools.partial(self._run, given), model, cache, kwargs, given.images)
        graphs, limit = len(one.call.graphs), capture.limit()
        if graphs > before and graphs >= limit - 2:
            warnings.warn(
                f"{graphs} graphs of {type(model).__name__} were captured; {limit} is the limit"
                " (the larger of vlmrewrite's and torch._dynamo.config.recompile_limit)",
                stacklevel=3,
            )
        if isinstance(keep, int) and keep != kwargs["logits_to_keep"]:
            out["logits"] = out.logits[:, -keep:]
        ran, layers = self.last(), cast(Any, cache.layers)
        for layer, entry in zip(layers, ran.result.plan.layers, strict=False):
            layer.holes = layer.holes or (entry.keys != All and not ran.call.counts.dense(entry.keys))
        return out

    def _run(self, given: Given, graph: Graph, inputs: Sequence[Any]) -> Any:
        vision = vision_mask(graph, inputs)
        call, missing = given.call(vision, self.wants, self.reads_last, self.config)
        executable = self._executable(graph, missing, given.images.features.device)
        result = executable.run(inputs, call)
        kind = call.vision.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        kept = replace(result, out=None)
        self.latest.set(LastCall(executable, kept, call, given, tuple(map(Layout.of, inputs)), autocast))
        return result.out

    def _executable(self, graph: Graph, missing: dict[str, str], device: torch.device) -> Executable:
        """The graph under this recipe: one for each device, and for each set of missing facts about the images."""
        key = graph, frozenset(missing), device
        with contextlib.nullcontext() if key in self.executables else self._lock:
            if key not in self.executables:
                self.executables[key] = made = compile(
                    graph_program(graph).lacking(missing),
                    self.passes,
                    strict=self.strict,
                    blocks=self.blocks,
                    kernels=self.kernels,
                    backend=resolve(self.backend, device),
                    device=device,
                )
                told = {f"{o.configuration} does nothing: {o.reason}" for o in made.program.outcomes if o.reason}
                for message in sorted(told - self._warned):
                    warnings.warn(f"recipe {self.recipe.name!r}: {message}", stacklevel=2)
                self._warned |= told
        return self.executables[key]


def _at_the_end(kwargs: dict[str, Any], given: Given, keep: int) -> bool:
    """Whether the last prompt token of every row is among the last ``keep`` tokens of a call."""
    tokens: Tensor = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    if given.end is not None:
        return int(given.end.min()) >= int(tokens.shape[1]) - keep
    return not isinstance(given.mask, Tensor) or given.mask.dim() != 2 or bool(given.mask[:, -keep:].any(1).all())


def _compiled_text(model: nn.Module, cache: PositionCache, kwargs: dict[str, Any], kernels: Kernels) -> Any:
    """Run the model's forward without an image, compiled; ``kwargs`` are its other arguments."""
    plain = kwargs.get("attention_mask") is None and not cache.holes()
    device = next(model.parameters()).device
    given = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
    reserved = cache.reserve(given.shape[1])

    def runner(graph: Graph, inputs: Sequence[Any]) -> Any:
        def make() -> tuple[DecodeStep, Callable[..., Any]]:
            step = DecodeStep.of(positioned(graph.gm, plain), reserved)
            return step, inductor(lower(step.graph_module, kernels, device).graph_module)

        step, run = graph.once(("decode", plain, kernels, device, reserved), make)
        return step.run(run, cache, inputs, given.shape[1])

    if not reserved:
        cache.contiguous()
    return captures_of(model).text(runner, model, cache, kwargs, None)
