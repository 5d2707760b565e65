"""A recipe at work on a model: what happens in one forward."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.fx
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.utils.generic import ModelOutput

from vlmrewrite import capture
from vlmrewrite.cache import PositionCache
from vlmrewrite.call import Call
from vlmrewrite.encode import Encoded, EncoderFeatures, encoded_images
from vlmrewrite.lower import Kernels, Lowered, lower
from vlmrewrite.plan import Pass
from vlmrewrite.program import Program, rewrite
from vlmrewrite.recipe import Recipe
from vlmrewrite.report import Report, make_report
from vlmrewrite.tokens import All, Selection
from vlmrewrite.traced import TRACED, Graph, tidy, traced

Backend = Literal["auto", "eager", "inductor"]


@dataclass
class Installed:
    """One captured graph with the recipe applied: what runs."""

    program: Program
    lowered: Lowered
    run: Callable[..., Any]
    vision: torch.fx.GraphModule


class Session:
    """A recipe applied to a model."""

    def __init__(self, model: nn.Module, recipe: Recipe, backend: Backend, kernels: Kernels, strict: bool) -> None:
        self.recipe, self.backend, self.kernels, self.strict = recipe, backend, kernels, strict
        self.passes: list[Pass] = list(recipe.passes)
        self.installed: dict[tuple[Graph, bool], Installed] = {}
        self.latest: tuple[Installed, Call] | None = None
        self.chosen: tuple[Tensor, ...] = ()
        self.plain_calls = 0
        self.prompt_end: Tensor | None = None
        self._encoded: Encoded | None = None
        self._call: dict[str, Any] = {}
        self.undo: list[Callable[[], Any]] = []
        self.encoder = EncoderFeatures(cast(nn.Module, weakref.proxy(model)))
        self.wants_encoder = any(getattr(p, "features", None) == "encoder" for p in self.passes)

    def last(self) -> tuple[Program, Call, dict[Selection, Tensor]]:
        """Program and call of the last call with an image, and what each selection chose in it.

        Raises:
            ValueError: there was none yet.
        """
        if self.latest is None:
            raise ValueError("no call with an image was made since the recipe was applied")
        program, call = self.latest[0].program, self.latest[1]
        assert program.rewritten is not None
        return program, call, dict(zip(program.rewritten.selections, self.chosen, strict=True))

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
                out = type(out)(**{k: v for k, v in out.items() if k != "past_key_values"})
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
        return PositionCache.take_over(given), True

    def _rewritten(self, model: nn.Module, cache: PositionCache, images: Encoded, kwargs: dict[str, Any]) -> Any:
        self._encoded, self._call = images, {"mask": kwargs.get("attention_mask"), "past": cache.get_seq_length()}
        one = traced(model)
        before = one.call.graphs
        out = one.run(self._run, model, cache, images, kwargs)
        if one.call.graphs > before and one.call.graphs >= one.call.limit - 2:
            warnings.warn(
                f"{one.call.graphs} graphs of {type(model).__name__} were captured; {one.call.limit} is the limit"
                " (the larger of vlmrewrite's and torch._dynamo.config.recompile_limit)",
                stacklevel=3,
            )
        assert self.latest is not None
        installed, call = self.latest
        layers: list[Any] = cache.layers
        for layer, entry in zip(layers, installed.program.plan.layers, strict=False):
            layer.holes = layer.holes or (entry.keys != All and not call.census.dense(entry.keys))
        return out

    def _run(self, graph: Graph, inputs: Sequence[Any]) -> Any:
        installed = self._install(graph)
        call = self._describe(installed, inputs)
        out, self.chosen = installed.run(*installed.program.arguments(inputs, call))
        self.latest = (installed, call)
        return out

    def _install(self, graph: Graph) -> Installed:
        """The graph under this recipe; another one where the encoder's features are there and where they are not."""
        reason = self.encoder.missing if self.wants_encoder else "no pass asked for them"
        key = graph, reason is None
        if key not in self.installed:
            base = graph.program({} if reason is None else {"encoder_features": reason})
            program = rewrite(base, self.passes, strict=self.strict)
            lowered = lower(program.graph_module, self.kernels)
            run: Callable[..., Any] = lowered.graph_module
            if self.backend == "inductor":
                run = torch.compile(lowered.graph_module, backend="inductor", dynamic=True)
            self.installed[key] = Installed(program, lowered, run, base.vision_mask())
        return self.installed[key]

    def _describe(self, installed: Installed, inputs: Sequence[Any]) -> Call:
        assert self._encoded is not None
        vision = installed.vision(*inputs)
        mask = self._call["mask"]
        padding = (
            mask[:, -vision.shape[1] :].bool().to(vision.device)
            if isinstance(mask, Tensor) and mask.dim() == 2
            else None
        )
        encoder = None
        if self.wants_encoder and self.encoder.missing is None:
            encoder = self.encoder.of(self._encoded)
            if encoder is None:
                raise ValueError(
                    "these images were not encoded by the last get_image_features of this model, so that the encoder's"
                    " features are not known; pass the pixels, or use features='projected'"
                )
        end = self.prompt_end
        if end is not None and (self._call["past"] or len(vision) % len(end) or int(end.max()) >= vision.shape[1]):
            end = None  # a later turn, or a part of the prompt
        elif end is not None:
            end = end.repeat_interleave(len(vision) // len(end))
        return Call(vision, padding, self._encoded.lengths, self._call["past"], end, encoder)

    def report(self, model: nn.Module) -> Report:
        """What was done so far; see :func:`vlmrewrite.report`."""
        one = TRACED.get(model)
        installed, call = self.latest if self.latest is not None else (None, None)
        return make_report(
            self.recipe.name,
            self.backend,
            self.passes,
            program=None if installed is None else installed.program,
            call=call,
            kernels={} if installed is None else installed.lowered.choices,
            graphs={} if one is None else {"captured": one.call.graphs, "limit": one.call.limit},
            seconds={} if one is None else {"capture": one.call.seconds},
            plain_calls=self.plain_calls,
        )
