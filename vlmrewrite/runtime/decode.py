"""Calls without images behind Inductor: decode steps on a cache, and prompts of text. No token is dropped in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from vlmrewrite.capture import Graph, captures_of
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.lower import DecodeStep, compiled, lower, positioned
from vlmrewrite.ops import Kernels


def run_text(model: nn.Module, cache: PositionCache, kwargs: dict[str, Any], kernels: Kernels) -> Any:
    """Run the model's forward without an image, compiled; ``kwargs`` are its other arguments."""
    plain = kwargs.get("attention_mask") is None and not cache.holes()
    device = next(model.parameters()).device
    given = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
    reserved = cache.reserve(given.shape[1])

    def runner(graph: Graph, inputs: Sequence[Any]) -> Any:
        def make() -> tuple[DecodeStep, Callable[..., Any]]:
            step = DecodeStep.of(positioned(graph.gm, plain), reserved)
            return step, compiled(lower(step.graph_module, kernels, device).graph_module)

        step, run = graph.once(("decode", plain, kernels, device, reserved), make)
        return step.run(run, cache, inputs, given.shape[1])

    if not reserved:
        cache.contiguous()
    return captures_of(model).text(runner, model, cache, kwargs, None)
