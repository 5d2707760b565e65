"""What happens in one forward: under a recipe, or to be captured only.

What a call knows is its own, never the session's.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vlmrewrite import capture, hf
from vlmrewrite.capture import CapturedForward, Graph, captures_of
from vlmrewrite.compiler import program_of
from vlmrewrite.errors import CaptureError
from vlmrewrite.hf import Encoded, Encoding, refuse_packed, tidy, wants_cache
from vlmrewrite.kvcache import PositionCache, adopted
from vlmrewrite.ops import Backend, Kernels
from vlmrewrite.plan import All, Plan, blocks_of, ends_in_last_column
from vlmrewrite.recipe import Recipe
from vlmrewrite.runtime.around import entering, in_place_of, refuse_unrewritten
from vlmrewrite.runtime.executables import Executables
from vlmrewrite.runtime.facts import ARGUMENT, Given, LastCall, Layout, Prompt, current_prompt, encoded_in, prompt_of
from vlmrewrite.runtime.latest import Latest
from vlmrewrite.runtime.learning import learning
from vlmrewrite.runtime.running import RunningShare
from vlmrewrite.runtime.text import TextCalls


@dataclass(eq=False)
class Session:
    """A recipe applied to a model.

    Attributes:
        recipe, backend, kernels, strict: what :func:`vlmrewrite.apply` was asked for.
        plan: the recipe's, as far as it is known without a model's graph.
        blocks: the parameters that it adds to the model, as they were put there, if there are any.
        inner: whether a language model inside generates, or merges: see :func:`vlmrewrite.hf.language_model`.
        checkpointing: which layers the backward pass computes again, as of the last call in training.
        compile_told: whether it was said that ``torch.compile`` around the model compiles nothing.
        untraced: why the decoder alone is captured, and not the model's forward; None where that is not so.
        text: calls without an image.
        running: of a recipe that asks for it, what rows of earlier calls showed; None: no call is visible to another.
    """

    recipe: Recipe
    backend: Backend
    kernels: Kernels
    strict: bool
    plan: Plan
    blocks: nn.Module | None
    inner: bool
    untraced: str | None = None
    checkpointing: hf.Checkpointing | None = None
    _thread: threading.local = field(default_factory=threading.local)
    _calls: Latest = field(default_factory=Latest)
    _lock: Any = field(default_factory=threading.RLock)
    compile_told: bool = False
    text: TextCalls = field(init=False)
    running: RunningShare | None = field(init=False)

    def __post_init__(self) -> None:
        self.text = TextCalls(self.backend, self.kernels)
        self.running = RunningShare() if getattr(self.plan.chooser, "running", False) else None

    @property
    def unlearned(self) -> int:
        """How many more rows with an image it takes until calls begin where earlier ones say, if they are to."""
        return 0 if self.running is None else self.running.unlearned

    @functools.cached_property
    def executables(self) -> Executables:
        """Each captured graph under it."""
        return Executables(self.recipe, self.backend, self.kernels, self.strict)

    @property
    def latest(self) -> LastCall | None:
        """The last call with an image, for the thread that asks: see :func:`vlmrewrite.kept_tokens`."""
        return self._calls.of_this_thread()

    @functools.cached_property
    def _asked(self) -> tuple[set[str], bool]:
        return self.plan.needs(), self.plan.reads_last

    def last(self) -> LastCall:
        """The last call with an image.

        Raises:
            ValueError: there was none yet.
        """
        if (latest := self.latest) is None:
            raise ValueError("no call with an image was made since the recipe was applied")
        return latest

    def encoded(self, encoding: Encoding) -> None:
        """Keep a run of the vision tower: with the generation or forward that made it, else as the thread's last."""
        prompt = current_prompt(self)
        if prompt is None:
            self._thread.encodings = [encoding]
        else:
            prompt.encodings.append(encoding)

    def below(self, model: nn.Module, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The forward of what is below the model's head, under this recipe; its decoder is captured alone."""
        prompt = current_prompt((self, "forward")) or Prompt()
        with prompt_of((self, "call"), prompt):
            prompt, kwargs = self._enter(model, prompt, hf.named(base, args, kwargs))
            if "logits_to_keep" not in hf.argument_names(type(base).forward):
                kwargs.pop("logits_to_keep", None)
            past = kwargs.get("past_key_values")
            with self.around(model, prompt, encoded_in(kwargs) or hf.marked(kwargs, past)):
                return type(base).forward(base, **kwargs)

    def forward(self, model: nn.Module, prompt: Prompt, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The model's forward under this recipe; its arguments and its outputs, which are not made a tuple here."""
        with prompt_of((self, "call"), prompt):
            own, kwargs = self._enter(model, prompt, hf.named(model, args, kwargs))
            return learning(model, self.plan, functools.partial(self._forward, model), prompt, own, kwargs)

    def _enter(self, model: nn.Module, prompt: Prompt, kwargs: dict[str, Any]) -> tuple[Prompt, dict[str, Any]]:
        """What a call knows and was given, its images encoded."""
        if model.training:
            with self._lock:
                before = self.checkpointing if hf.is_checkpointing(model) else None
                self.checkpointing = hf.take_checkpointing(model, vars(model)[hf.APPLIED]) or before
        with prompt_of(self, own := Prompt()):
            kwargs, sizes = tidy(model, (), kwargs, encode=not self.inner)
        known = own.encodings + prompt.encodings + getattr(self._thread, "encodings", [])
        return replace(prompt, encodings=known, sizes=sizes or prompt.sizes), kwargs

    def _forward(self, model: nn.Module, prompt: Prompt, kwargs: dict[str, Any]) -> Any:
        if self.inner:
            with self.around(model, prompt):
                out = type(model).forward(model, return_dict=True, **kwargs)
            refuse_unrewritten(model, "forward", hf.images_of(kwargs), current_prompt((self, "call")))
            return out
        past, use_cache = kwargs.pop("past_key_values", None), kwargs.pop("use_cache", None)
        keep = past is not None or wants_cache(model, use_cache)
        with adopted(past, model, keep) as cache:
            given, rest = Given.of(kwargs, cache, prompt)
            images, untraced = hf.marked(rest, cache) if given is None else given.images, None
            if not images:
                return self.text(model, cache if keep else None, rest)
            if not keep:
                refuse_packed(kwargs)
            if given is not None and self.untraced is None:
                try:
                    return self._with_images("call", model, model, cache, given, rest, keep)
                except CaptureError as e:
                    if hf.exchanged(hf.decoder_of(model)):  # by what this one cannot see into
                        raise
                    untraced = str(e)
            with self.around(model, prompt, images):
                out = type(model).forward(model, **kwargs, past_key_values=cache, use_cache=True, return_dict=True)
            self.untraced = self.untraced or untraced
            return out if keep else _without_cache(out)

    @contextlib.contextmanager
    def around(
        self, model: nn.Module, prompt: Prompt, images: Mapping[str, Encoded] = MappingProxyType({})
    ) -> Iterator[None]:
        """While the block runs, calls of the model's decoder are under this recipe.

        Args:
            prompt: what is known of the prompt.
            images: those that are encoded already.
        """
        decoder = hf.decoder_of(model)

        def run(kwargs: dict[str, Any]) -> Any:
            kwargs = {k: x for k, x in kwargs.items() if k not in (ARGUMENT, "return_dict")}
            past, use_cache = kwargs.pop("past_key_values", None), kwargs.pop("use_cache", None)
            keep = past is not None or wants_cache(model, use_cache)
            with adopted(past, model, keep) as cache:
                given, rest = entering(kwargs, cache, prompt, images, runs)
                if given is None:
                    return self.text(decoder, cache if keep else None, rest)
                if not keep:
                    refuse_packed(kwargs)
                return self._with_images("inner", model, decoder, cache, given, rest, keep)

        with contextlib.ExitStack() as stack:
            runs = [] if images else stack.enter_context(hf.projections(model))
            stack.enter_context(in_place_of(decoder, run))
            yield

    def _with_images(
        self,
        role: Literal["call", "inner"],
        model: nn.Module,
        target: nn.Module,
        cache: PositionCache,
        given: Given,
        kwargs: dict[str, Any],
        keep_cache: bool,
    ) -> Any:
        """A call with an image, of the model or (``target``) of its decoder alone."""
        if self.plan.judges_logits and target.get_output_embeddings() is None:  # type: ignore[operator]
            raise NotImplementedError(
                f"recipe {self.recipe.name!r} chooses by logits, and {type(target).__name__}, captured without the rest"
                f" of {type(model).__name__}, has none: expected another recipe, or a model that can be captured whole"
            )
        keep = kwargs.get("logits_to_keep")
        if self.plan.judges_logits and isinstance(keep, int) and keep and not _at_the_end(kwargs, given, keep):
            kwargs = kwargs | {"logits_to_keep": 0}
        one: CapturedForward = getattr(captures_of(target := hf.hollow(model, target, self)), role)
        told, before = list[LastCall](), len(one.graphs)
        out = one(functools.partial(self._run, model, given, told), target, cache, kwargs, given.images, model)
        graphs, limit = len(one.graphs), capture.limit()
        if graphs > before and graphs >= limit - 2:
            warnings.warn(
                f"{graphs} graphs of {type(target).__name__} were captured; {limit} is the limit"
                " (the larger of vlmrewrite's and torch._dynamo.config.recompile_limit)",
                stacklevel=3,
            )
        if isinstance(keep, int) and keep != kwargs["logits_to_keep"]:
            out["logits"] = out.logits[:, -keep:]
        ran, cache.steady = told[0], False
        for prompt in (current_prompt(self), current_prompt((self, "call"))):
            if prompt is not None:
                prompt.made = ran
        self._calls.add(ran)
        for layer, *entries in zip(cache.layers, *(plan.layers for plan in ran.plans), strict=False):
            keys = {entry.keys for entry in entries}
            some = len(keys) > 1 or any(s != All and not ran.call.counts.dense(s) for s in keys)
            layer.holes = layer.holes or some
        return out if keep_cache else _without_cache(out)

    def _run(self, model: nn.Module, given: Given, told: list[LastCall], graph: Graph, inputs: Sequence[Any]) -> Any:
        blocks, again = blocks_of(model), self.checkpointing if model.training and torch.is_grad_enabled() else None
        sites = hf.sites(inputs) if hf.elsewhere(model) else ()
        call, missing = given.call(graph, inputs, *self._asked, model)
        assert call is not None, "a call on the meta device runs nothing"
        last = not torch.is_grad_enabled() and program_of(graph).reads_last(inputs) and ends_in_last_column(call)
        how = call.vision.device, blocks, again, sites, last
        executable = self.executables.of(graph, missing, *how)
        if more := executable.program.needs - self._asked[0]:  # of a pass that makes do with something else
            call, missing = given.call(graph, inputs, more | self._asked[0], self._asked[1], model)
            assert call is not None
            executable = self.executables.of(graph, missing, *how)
        seen = self.running if call.follows is None and not model.training else None
        plans = len(executable.program.plan.variants)
        if seen is not None:
            call.begins = seen.begin(plans, functools.partial(executable.program.apart, call))
        result = executable.run(hf.to_bring(inputs) if sites else inputs, call)
        if seen is not None:
            seen.add(result.runs, call.with_images.tolist(), plans)
        kind, layouts = call.vision.device.type, Layout.of_all(graph, inputs)
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        told.append(LastCall(executable, replace(result, out=None), call, given, layouts, autocast))
        return result.out


def _without_cache(out: Any) -> Any:
    return type(out)(**{k: v for k, v in out.items() if k != "past_key_values"})


SESSIONS: WeakKeyDictionary[nn.Module, Session] = WeakKeyDictionary()


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
        ) from None


def _at_the_end(kwargs: dict[str, Any], given: Given, keep: int) -> bool:
    """Whether the last prompt token of every row is among the last ``keep`` tokens of a call."""
    tokens: Tensor = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
    if given.end is not None:
        return int(given.end.min()) >= given.past + int(tokens.shape[1]) - keep
    return given.padding is None or bool(given.padding[:, -keep:].any(1).all())
