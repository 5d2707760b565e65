"""What vLLM calls when it starts."""

from __future__ import annotations

import functools
from typing import Any

from vlmrewrite.compat import VersionError, vllm, vllm_patch
from vlmrewrite.serving.placeholders import rows_of
from vlmrewrite.serving.vllm.model import before_of, pruned
from vlmrewrite.serving.vllm.processing import wraps
from vlmrewrite.serving.vllm.settings import check_model, serving_recipe, takes_images


def register() -> None:
    """Make recipes known to this process of vLLM. Called again, it changes nothing.

    Where vLLM lacks something that is needed, a warning names it, engines without a recipe start as ever, and one with
    a recipe does not start.

    Raises:
        VersionError: vLLM is not installed.
    """
    vllm.versions()
    try:
        vllm_patch.install(_changed, _rows, _again)
    except VersionError as missing:
        _only_refuses(str(missing))


def _only_refuses(missing: str) -> None:
    def refused(chosen: type, model_config: Any) -> type:
        if serving_recipe(model_config.hf_config) is not None:
            raise VersionError(f"no recipe of vlmrewrite can be served: {missing}")
        return chosen

    try:
        vllm_patch.guard(refused)
    except VersionError as error:
        vllm.warn(f"vlmrewrite does nothing here, also where a recipe is given, which is then IGNORED: {error}")
        return
    vllm.warn(f"vlmrewrite does nothing here, and an engine with a recipe does not start: {missing}")


def _changed(chosen: type, model_config: Any) -> type:
    """The class that is used in place of one that vLLM chose.

    It is the same with and without a recipe: vLLM keeps it by a model's name for all engines of a process.
    """
    if serving_recipe(model_config.hf_config) is not None:
        check_model(chosen, model_config)
        _tell_versions()
    return _made(chosen) if takes_images(chosen) else chosen


def _tell_versions() -> None:
    if (pair := vllm.versions()) not in vllm.TESTED_PAIRS:
        tested = "; ".join(f"vLLM {a} with transformers {b}" for a, b in vllm.TESTED_PAIRS)
        vllm.warn(f"vlmrewrite was tested with {tested}; these are vLLM {pair[0]} and transformers {pair[1]}")


@functools.cache
def _made(chosen: type) -> type:
    changed = pruned(chosen)
    vllm.processes_with(chosen, changed, wraps())
    return changed


def _again(model: Any, model_config: Any) -> bool:
    """Whether a loaded model has a recipe.

    Raises:
        ValueError: its configuration names one, and the model knows nothing of it.
    """
    before, named = before_of(model), serving_recipe(model_config.hf_config) is not None
    if named and before is None:
        raise ValueError(
            f"expected a model that leaves tokens of images out, as its configuration has a recipe of vlmrewrite, got"
            f" a {type(model).__name__} that vLLM made in another way: serve it without the recipe"
        )
    return before is not None


def _rows(model_config: Any, axes: int) -> int:
    """How many rows a position has in the engine."""
    return axes if serving_recipe(model_config.hf_config) is None else rows_of(max(axes, 1))
