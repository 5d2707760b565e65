"""What vLLM calls when it starts."""

from __future__ import annotations

import functools
from typing import Any

from vlmrewrite.compat import vllm
from vlmrewrite.serving.placeholders import rows_of
from vlmrewrite.serving.vllm.model import before_of, pruned
from vlmrewrite.serving.vllm.processing import wraps
from vlmrewrite.serving.vllm.settings import check_model, serving_recipe


def register() -> None:
    """Make recipes known to this process of vLLM. Called again, it changes nothing.

    Raises:
        VersionError: vLLM is not installed, or lacks something that is needed, which the message names.
    """
    pair = vllm.versions()
    vllm.install(_changed, _rows, lambda model: before_of(model) is not None)
    if pair not in vllm.TESTED_PAIRS:
        tested = "; ".join(f"vLLM {a} with transformers {b}" for a, b in vllm.TESTED_PAIRS)
        vllm.warn(f"vlmrewrite was tested with {tested}; these are vLLM {pair[0]} and transformers {pair[1]}")


def _changed(chosen: type, model_config: Any) -> type:
    """The class that is used in place of one that vLLM chose; the same for engines with and without a recipe."""
    if serving_recipe(model_config.hf_config) is not None:
        check_model(chosen, model_config)
    return _made(chosen) if hasattr(chosen, "embed_multimodal") else chosen


@functools.cache
def _made(chosen: type) -> type:
    changed = pruned(chosen)
    vllm.processes_with(chosen, changed, wraps())
    return changed


def _rows(model_config: Any, axes: int) -> int:
    """How many rows a position has in the engine."""
    return axes if serving_recipe(model_config.hf_config) is None else rows_of(max(axes, 1))
