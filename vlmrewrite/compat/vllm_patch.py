"""What is put between vLLM and its models; names of vLLM's are looked up before the first of them is changed."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from vlmrewrite.compat.private import attribute, find
from vlmrewrite.compat.vllm import PRUNER, REGISTRY, RUNNERS, hooks, second_runner

_DONE = "_vlmrewrite"
"""An attribute of vLLM's registry in a process in which it is changed."""


def guard(change: Callable[[type, Any], type]) -> None:
    """Put a function between vLLM's choice of a model's class and its use, and nothing else.

    Called again, it changes nothing.

    Args:
        change: takes the class that vLLM chose for a model and the ``ModelConfig``; returns the class that is used.

    Raises:
        VersionError: vLLM does not choose where it did. Nothing is changed then.
    """
    registry = find(*REGISTRY)
    if hasattr(registry, _DONE):
        return
    resolve = attribute(registry, "resolve_model_cls", "vllm")

    @functools.wraps(resolve)
    def resolve_model_cls(architectures: Any, model_config: Any) -> tuple[type, str]:
        chosen, name = resolve(architectures, model_config=model_config)
        return change(chosen, model_config), name

    registry.resolve_model_cls = resolve_model_cls
    setattr(registry, _DONE, True)


def install(
    change: Callable[[type, Any], type], axes: Callable[[Any, int], int], positions_again: Callable[[Any, Any], bool]
) -> None:
    """Put functions between vLLM and its models. Called again, it changes nothing.

    Args:
        change: as of :func:`guard`.
        axes: takes a ``ModelConfig`` and how many axes its positions have (0: they are no M-RoPE); returns how many
            rows the engine keeps for a position.
        positions_again: of a loaded model and its ``ModelConfig``, whether it is asked for positions again when images
            were encoded.

    Raises:
        VersionError: something that is needed is missing. Nothing is changed then.
    """
    if hasattr(find(*REGISTRY), _DONE):
        return
    found, config = hooks(), find("vllm.config", "ModelConfig")
    guard(change)
    uses, rows = found["ModelConfig.uses_mrope"].fget, found["ModelConfig.mrope_num_dims"].fget

    def now(self: Any) -> int:
        return axes(self, rows(self) if uses(self) else 0)

    config.uses_mrope = property(lambda self: now(self) > 0)
    config.mrope_num_dims = property(now)
    for module, name in RUNNERS:
        kind = find(module, name)
        kind.load_model = _asked_again(found[f"{name}.load_model"], positions_again)
    if second_runner() is None:
        _second_runner_asks(found["maybe_create_mm_pruner"], positions_again)


def _asked_again(load: Callable[..., Any], positions_again: Callable[[Any, Any], bool]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = load(self, *args, **kwargs)
        if positions_again(self.get_model(), self.model_config):
            self.is_multimodal_pruning_enabled = True
        return made

    return load_model


def _second_runner_asks(make: Callable[..., Any], positions_again: Callable[[Any, Any], bool]) -> None:
    """The same in vLLM's second model runner."""
    kind = find("vllm.v1.worker.gpu.model_states.mm_pruning", "MultiModalPruner")

    @functools.wraps(make)
    def maybe_create_mm_pruner(model_config: Any, model: Any, rope_state: Any, encoder_cache: Any) -> Any:
        if not positions_again(model, model_config) or rope_state is None or encoder_cache is None:
            return make(model_config, model, rope_state, encoder_cache)
        return kind(model, rope_state, encoder_cache, model_config.get_inputs_embeds_size())

    setattr(importlib.import_module(PRUNER[0]), PRUNER[1], maybe_create_mm_pruner)
