"""Interfaces of vLLM that a plug-in needs and vLLM does not promise: each is named here, and nowhere else.

``vllm`` is imported when a function is called, and not before. What the functions do is checked in ``tests/serving``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from vlmrewrite.compat.private import attribute, find, lacking

TESTED_PAIRS = (("0.32.0", "5.23.0"),)
"""Versions of vLLM and transformers that ``tests/serving`` passed with, together."""

RUNNERS = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner"),
)
"""What runs a model: each sets, when it has loaded one, whether positions are asked for again."""

PRUNER = ("vllm.v1.worker.gpu.model_states.default", "maybe_create_mm_pruner")
"""The same in the second model runner, which can be imported where what it needs is installed."""

REGISTRY = ("vllm.model_executor.models.registry", "ModelRegistry")
"""What chooses the class of a model."""

_PROCESSOR = ("_get_mm_prompt_updates", "_get_mm_hashes", "_maybe_apply_prompt_updates")

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def _vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError:
        raise lacking("vllm") from None


def versions() -> tuple[str, str]:
    """The versions of vLLM and transformers that are installed."""
    return getattr(_vllm(), "__version__", "of an unknown version"), importlib.import_module("transformers").__version__


_LOG = logging.getLogger("vllm.vlmrewrite")


@functools.cache
def log(text: str) -> None:
    """A line in vLLM's log, once a process."""
    _LOG.info("%s", text)


@functools.cache
def warn(text: str) -> None:
    """A warning in vLLM's log, once a process."""
    _LOG.warning("%s", text)


def hooks() -> dict[str, Any]:
    """What is wrapped or called, by name.

    Raises:
        VersionError: one is missing, or takes other arguments than it did.
    """
    config = find("vllm.config", "ModelConfig")
    processor = find("vllm.multimodal.processing", "BaseMultiModalProcessor")
    found = {"ModelRegistry.resolve_model_cls": attribute(find(*REGISTRY), "resolve_model_cls", "vllm")}
    for name in ("uses_mrope", "mrope_num_dims"):
        found[f"ModelConfig.{name}"] = attribute(config, name, "vllm")
        if not isinstance(found[f"ModelConfig.{name}"], property):
            raise lacking("vllm", f"ModelConfig.{name} that is a property")
    for name in _PROCESSOR:
        found[f"BaseMultiModalProcessor.{name}"] = attribute(processor, name, "vllm")
    for module, name in RUNNERS:
        found[f"{name}.load_model"] = attribute(find(module, name), "load_model", "vllm")
    pruning = find("vllm.model_executor.models.interfaces", "SupportsMultiModalPruning")
    again = attribute(pruning, "recompute_mrope_positions", "vllm")
    wanted = ["self", "input_ids", "multimodal_embeddings", "mrope_positions", "num_computed_tokens"]
    if (got := [*inspect.signature(again).parameters]) != wanted:
        raise lacking("vllm", f"recompute_mrope_positions({', '.join(wanted[1:])}), but one of ({', '.join(got[1:])})")
    mrope = find("vllm.model_executor.models.interfaces", "SupportsMRoPE")
    attribute(mrope, "get_mrope_input_positions", "vllm")
    for name in ("MultiModalBatchedField", "MultiModalFieldElem", "MultiModalFeatureSpec", "PlaceholderRange"):
        find("vllm.multimodal.inputs", name)
    find("vllm.multimodal.registry", "_ProcessorFactories")
    if "keep_on_cpu" not in inspect.signature(find("vllm.multimodal.inputs", "MultiModalBatchedField")).parameters:
        raise lacking("vllm", "MultiModalBatchedField(keep_on_cpu=)")
    find("vllm.multimodal.processing", "PromptUpdateDetails")
    attribute(find("vllm.multimodal", "MULTIMODAL_REGISTRY"), "get_processing_info", "vllm")
    for name in ("uses_mrope", "mrope_num_dims"):
        find("vllm.transformers_utils.config", name)
    if second_runner() is None:
        found["maybe_create_mm_pruner"] = find(*PRUNER)
        find("vllm.v1.worker.gpu.model_states.mm_pruning", "MultiModalPruner")
    return found


@functools.cache
def second_runner() -> str | None:
    """Why vLLM's second model runner cannot be imported here; None: it can.

    Raises:
        VersionError: it is not where it was.
    """
    try:
        importlib.import_module(PRUNER[0])
    except ModuleNotFoundError as error:
        if error.name and PRUNER[0].startswith(error.name):
            raise lacking("vllm", PRUNER[0]) from error
        return str(error)
    except (ImportError, OSError, RuntimeError) as error:  # of a device's libraries that are not there
        return f"{type(error).__name__}: {error}"
    return None


def uses_second_runner(vllm_config: Any) -> bool:
    """Whether an engine's model is run by vLLM's second model runner."""
    return bool(getattr(vllm_config, "use_v2_model_runner", False))


def modalities(model_config: Any) -> list[str]:
    """What a model takes beside text, as its processor names it."""
    info = find("vllm.multimodal", "MULTIMODAL_REGISTRY").get_processing_info(model_config)
    return sorted(attribute(info, "get_supported_mm_limits", "vllm")())


def axes_of(model_config: Any) -> int:
    """Axes of an unchanged model's positions: 0 without M-RoPE."""
    uses, rows = (find("vllm.transformers_utils.config", name) for name in ("uses_mrope", "mrope_num_dims"))
    return int(rows(model_config.hf_config)) if uses(model_config.hf_config) else 0


def processes_with(base: type, changed: type, wraps: Mapping[str, Callable[[Any], Wrap]]) -> None:
    """Let a class's processors have other methods than those of the class that it is made from.

    Args:
        base: the class.
        changed: the class made from it.
        wraps: by name of a method, a function that takes the processor and returns what wraps the method.
    """
    old = attribute(base, "_processor_factory", "vllm")

    def processor(info: Any, dummy_inputs: Any) -> Any:
        made = old.processor(info, dummy_inputs)
        for name, wrap in wraps.items():
            setattr(made, name, wrap(made)(attribute(made, name, "vllm")))
        return made

    changed._processor_factory = dataclasses.replace(old, processor=processor)  # type: ignore[attr-defined]


def wraps_of(updates: Callable[[Any], Wrap], hashes: Callable[[Any], Wrap], prompt: Callable[[Any], Wrap]) -> Any:
    """For :func:`processes_with`: what makes placeholders, keys of caches, and the whole prompt."""
    return dict(zip(_PROCESSOR, (updates, hashes, prompt), strict=True))


def placeholders(tokens: list[int], mask: Callable[[Any], Tensor]) -> Any:
    """What stands for an image in a prompt: tokens, and a function that tells which of them are placeholders."""
    return find("vllm.multimodal.processing", "PromptUpdateDetails")(tokens, mask)


def argument(value: Tensor) -> Any:
    """A further argument of ``embed_multimodal`` for an image; it stays on the CPU."""
    field = find("vllm.multimodal.inputs", "MultiModalBatchedField")(keep_on_cpu=True)
    return find("vllm.multimodal.inputs", "MultiModalFieldElem")(data=value, field=field)


def feature(data: Any, modality: str, offset: int, length: int, mask: Tensor | None) -> Any:
    """An image, video or sound of a prompt, as ``get_mrope_input_positions`` takes it."""
    place = find("vllm.multimodal.inputs", "PlaceholderRange")(offset, length, mask)
    return find("vllm.multimodal.inputs", "MultiModalFeatureSpec")(data, modality, "", place)


def item(values: Mapping[str, Any]) -> Any:
    """Arguments of one image."""
    kind = find("vllm.multimodal.inputs", "MultiModalKwargsItem")
    return kind({k: argument(v) for k, v in values.items()})


def as_unchanged(vllm_config: Any, mark: str, longer: int) -> Any:
    """A configuration as it is without a recipe, for the constructor of the class that a model is made from.

    What is not copied is shared.

    Args:
        vllm_config: of the engine.
        mark: the name in the model's configuration that the recipe has.
        longer: how many times as many positions tables of ropes get that are not stretched by their length.
    """
    made, model = copy.copy(vllm_config), copy.copy(vllm_config.model_config)
    whole, text = copy.copy(model.hf_config), model.hf_config.get_text_config()
    vars(whole).pop(mark, None)
    copied = whole if text is model.hf_config else copy.copy(text)
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") == "default" and hasattr(text, "max_position_embeddings"):
        copied.max_position_embeddings = longer * text.max_position_embeddings
    for name, value in vars(whole).items():
        if value is text:
            setattr(whole, name, copied)
    model.hf_config, model.hf_text_config = whole, copied
    made.model_config = model
    return made


def rows_of_ropes(model: torch.nn.Module) -> int | None:
    """How many positions the tables of a model's ropes have; None if it has no tables.

    Of its language model, where it can say which that is; else of the whole model, whose tower may have fewer.

    Raises:
        ValueError: a rope looks positions up in another way.
    """
    text = model
    if hasattr(model, "get_language_model"):
        with suppress(NotImplementedError):
            text = model.get_language_model()  # type: ignore[operator]
    for m in text.modules():
        if other := sorted(k for k, _ in m.named_buffers(recurse=False) if "cos_sin" in k and k != "cos_sin_cache"):
            got = f"{type(m).__name__}.{other[0]}"
            raise ValueError(f"with a recipe: expected ropes with one table of positions, cos_sin_cache, got {got}")
    tables = [getattr(m, "cos_sin_cache", None) for m in text.modules()]
    return min((len(t) for t in tables if isinstance(t, Tensor)), default=None)
