"""A recipe at work on a model: what happens in one forward."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.generic import ModelOutput

from vlmrewrite import capture
from vlmrewrite.analysis import Layout
from vlmrewrite.capture import Graph, captures_of
from vlmrewrite.hf import (
    Encoded,
    EncoderFeatures,
    encoded_images,
    grids,
    refuse_packed,
    tidy,
    wants_cache,
    without_full_mask,
)
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.lower import Executable, RunResult
from vlmrewrite.ops import Backend, Kernels, choose, resolve
from vlmrewrite.plan import All, Call, Pass, Plan, Selection
from vlmrewrite.recipe import Recipe
from vlmrewrite.rewrite import Program, rewrite
from vlmrewrite.runtime.decode import run_text
from vlmrewrite.runtime.programs import graph_program, vision_mask


@dataclass(frozen=True)
class Given:
    """What a call with an image was given, as far as the captured graph's inputs do not say.

    Attributes:
        images: the encoded images.
        mask: the attention mask, or None without padding.
        past: logical length of the cache before the call.
        held: keys that each layer held before the call.
        thw: the model's image-grid input, int [I, 3], or None.
    """

    images: Encoded
    mask: Any
    past: int
    held: tuple[int, ...]
    thw: Tensor | None


@dataclass(frozen=True)
class LastCall:
    """The last call with an image: what ran, what came out of it, the call, and what it was given.

    ``inputs`` are the captured graph's flat inputs, a :class:`Layout` for each tensor; ``autocast`` the dtype that
    operators were cast to, or None.
    """

    executable: Executable
    result: RunResult
    call: Call
    given: Given
    inputs: tuple[Any, ...]
    autocast: torch.dtype | None


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
        self.executables: dict[tuple[Graph, frozenset[str]], Executable] = {}
        self.latest: LastCall | None = None
        self.plain_calls = 0
        self.compiled_calls = 0
        self.prompt_end: Tensor | None = None
        self.thw: Tensor | None = None
        self.undo: list[Callable[[], Any]] = []
        self.encoder = EncoderFeatures(cast(nn.Module, weakref.proxy(model)))
        self.wants = plan.needs()
        self.judges_logits = plan.chooser is not None and plan.chooser.op is None
        reads = plan.chooser is not None and plan.chooser.op is not None
        self.reads_last = reads or bool(self.wants & {"attention", "attention_outside"})
        self.config: Any = model.config

    def last(self) -> tuple[Program, Call, dict[Selection, Tensor]]:
        """Program and call of the last call with an image, and what each selection chose in it.

        Raises:
            ValueError: there was none yet.
        """
        if self.latest is None:
            raise ValueError("no call with an image was made since the recipe was applied")
        program, call = self.latest.result.program, self.latest.call
        assert program.rewritten is not None
        return program, call, dict(zip(program.rewritten.selections, self.latest.result.chosen, strict=True))

    # ---- one forward

    def forward(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The model's forward under this recipe; same arguments and outputs."""
        if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
            raise NotImplementedError(
                "gradient checkpointing is on, and the rewritten graph keeps its activations: call"
                " model.gradient_checkpointing_disable()"
            )
        kwargs = tidy(model, args, kwargs)
        return_dict = kwargs.pop("return_dict", None)
        return_dict = model.config.return_dict if return_dict is None else return_dict  # type: ignore[union-attr]
        given, use_cache = kwargs.pop("past_key_values", None), kwargs.pop("use_cache", None)
        output = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        with self._cache(given) as cache:
            keep = given is not None or wants_cache(model, use_cache)
            if output is None:
                out = self._text(model, cache if keep else None, kwargs)
            else:
                thw = kwargs.pop("mm_encoder_outputs").get("image_grid_thw", kwargs.get("image_grid_thw", self.thw))
                if not keep:
                    refuse_packed(kwargs)
                out = self._rewritten(model, cache, encoded_images(output), thw, without_full_mask(kwargs))
                if not keep:
                    out = type(out)(**{k: v for k, v in out.items() if k != "past_key_values"})
        assert isinstance(out, ModelOutput)
        return out if return_dict else out.to_tuple()

    def _text(self, model: nn.Module, cache: PositionCache | None, kwargs: dict[str, Any]) -> Any:
        """A call without an image: nothing is dropped, and what the cache holds is what each layer sees."""
        self.plain_calls += 1
        one, keep, device = captures_of(model), cache is not None, next(model.parameters()).device
        if cache is not None:
            kwargs = without_full_mask(kwargs)
            if resolve(self.backend, device) == "inductor":
                self.compiled_calls += 1
                return run_text(model, cache, kwargs, self.kernels)
        kernels = self.kernels if choose(self.kernels, device).kernel == "triton" else None
        with capture.running(cache, kernels):
            return one.forward(model, past_key_values=cache, use_cache=keep, return_dict=True, **kwargs)

    def _cache(self, given: Any) -> AbstractContextManager[PositionCache]:
        if given is None or isinstance(given, PositionCache):
            return contextlib.nullcontext(PositionCache() if given is None else given)
        if not isinstance(given, Cache):
            raise TypeError(f"past_key_values is a {type(given).__name__}; expected a transformers Cache")
        if type(given) is not DynamicCache or given.offloading:
            raise NotImplementedError(
                f"{type(given).__name__} cannot hold another number of tokens in each layer; expected a DynamicCache"
                " without offloading (is cache_implementation set in the generation config?)"
            )
        if given.get_seq_length() > 0:
            raise ValueError(
                f"past_key_values holds {given.get_seq_length()} tokens that went through the unmodified model;"
                " start again with an empty cache"
            )
        return PositionCache.taking_over(given)

    def _rewritten(
        self, model: nn.Module, cache: PositionCache, images: Encoded, thw: Tensor | None, kwargs: dict[str, Any]
    ) -> Any:
        mask, past, held = kwargs.get("attention_mask"), cache.get_seq_length(), tuple(cache.kv_lengths())
        given = Given(images, mask, past, held, thw)
        keep = kwargs.get("logits_to_keep")
        if self.judges_logits and isinstance(keep, int) and keep and not self._at_the_end(kwargs, mask, keep):
            kwargs = kwargs | {"logits_to_keep": 0}
        one = captures_of(model)
        before = one.call.graphs
        out = one.run(functools.partial(self._run, given), model, cache, images, kwargs)
        if one.call.graphs > before and one.call.graphs >= one.call.limit - 2:
            warnings.warn(
                f"{one.call.graphs} graphs of {type(model).__name__} were captured; {one.call.limit} is the limit"
                " (the larger of vlmrewrite's and torch._dynamo.config.recompile_limit)",
                stacklevel=3,
            )
        assert self.latest is not None
        program, call = self.latest.result.program, self.latest.call
        if isinstance(keep, int) and keep != kwargs["logits_to_keep"]:
            out["logits"] = out.logits[:, -keep:]
        layers: list[Any] = cache.layers
        for layer, entry in zip(layers, program.plan.layers, strict=False):
            layer.holes = layer.holes or (entry.keys != All and not call.counts.dense(entry.keys))
        return out

    def _at_the_end(self, kwargs: dict[str, Any], mask: Any, keep: int) -> bool:
        """Whether the last prompt token of every row is among the last ``keep`` tokens of a call."""
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        if self.prompt_end is not None:
            return int(self.prompt_end.min()) >= int(tokens.shape[1]) - keep
        return not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask[:, -keep:].any(1).all())

    def _run(self, given: Given, graph: Graph, inputs: Sequence[Any]) -> Any:
        call, missing = self._describe(vision_mask(graph, inputs), given)
        executable = self._executable(graph, missing, given.images.features.device)
        result = executable.run(inputs, call)
        kind = call.vision.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.latest = LastCall(
            executable, replace(result, out=None), call, given, tuple(map(Layout.of, inputs)), autocast
        )
        return result.out

    def _executable(self, graph: Graph, missing: dict[str, str], device: torch.device) -> Executable:
        """The graph under this recipe; another one where other facts about the images are missing."""
        key = graph, frozenset(missing)
        if key not in self.executables:
            base = graph_program(graph).lacking(missing)
            program = rewrite(base, self.passes, strict=self.strict, blocks=self.blocks)
            self.executables[key] = Executable.of(program, self.kernels, resolve(self.backend, device), device)
        return self.executables[key]

    def _describe(self, vision: Tensor, given: Given) -> tuple[Call, dict[str, str]]:
        """The call, and which of the facts that the recipe asks for are missing, with the reason."""
        mask, missing = given.mask, dict[str, str]()
        padding = (
            mask[:, -vision.shape[1] :].bool().to(vision.device)
            if isinstance(mask, Tensor) and mask.dim() == 2
            else None
        )
        encoder = None
        if "encoder_features" in self.wants:
            if self.encoder.missing is not None:
                missing["encoder_features"] = self.encoder.missing
            elif (encoder := self.encoder.of(given.images)) is None:
                raise ValueError(
                    "these images were not encoded by the last get_image_features of this model, so that the encoder's"
                    " features are not known; pass the pixels, or use features='projected'"
                )
        end, ends = None if self.prompt_end is None else self.prompt_end.to(vision.device), None
        if end is not None and not len(vision) % len(end):
            end = end.repeat_interleave(len(vision) // len(end)) - given.past
            here = (end >= 0) & (end < vision.shape[1])
            if not self.reads_last:
                ends = here
            end = end if bool(here.all()) else None
        else:
            end = None
        call = Call(vision, padding, given.images.lengths, given.past, end, encoder, ends=ends)
        if "grid" in self.wants:
            found = grids(self.config, call.counts.images, given.thw)
            if isinstance(found, str):
                missing["grid"] = found
            else:
                call.grid = found
        return call, missing
