"""Interfaces of vLLM that a plug-in needs and vLLM does not promise: each is named here, and nowhere else.

``vllm`` is imported when a function is called, and not before. What the functions do is checked in ``tests/serving``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmrewrite.compat.private import attribute, find, lacking

TESTED_PAIRS = (("0.32.0", "5.23.0"),)
"""Versions of vLLM and transformers that ``tests/serving`` passed with, together."""

_RUNNERS = (
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner"),
    ("vllm.v1.worker.cpu_model_runner", "CPUModelRunner"),
)
"""What runs a model: each sets, when it has loaded one, whether positions are asked for again."""

_PRUNER = ("vllm.v1.worker.gpu.model_states.default", "maybe_create_mm_pruner")
"""The same in the second model runner; Triton is imported with it."""

_PROCESSOR = ("_get_mm_prompt_updates", "_get_mm_hashes", "_maybe_apply_prompt_updates")

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


def _vllm() -> Any:
    try:
        return importlib.import_module("vllm")
    except ImportError:
        raise lacking("vllm", "vllm") from None


def versions() -> tuple[str, str]:
    """The versions of vLLM and transformers that are installed."""
    return _vllm().__version__, importlib.import_module("transformers").__version__


def log(text: str) -> None:
    """A line in vLLM's log, once a process."""
    find("vllm.logger", "init_logger")("vllm.vlmrewrite").info_once("%s", text)


def warn(text: str) -> None:
    """A warning in vLLM's log, once a process."""
    find("vllm.logger", "init_logger")("vllm.vlmrewrite").warning_once("%s", text)


def hooks() -> dict[str, Any]:
    """What is wrapped or called, by name.

    Raises:
        VersionError: one is missing, or takes other arguments than it did.
    """
    registry = find("vllm.model_executor.models.registry", "ModelRegistry")
    config = find("vllm.config", "ModelConfig")
    processor = find("vllm.multimodal.processing", "BaseMultiModalProcessor")
    found = {"ModelRegistry.resolve_model_cls": attribute(registry, "resolve_model_cls", "vllm")}
    for name in ("uses_mrope", "mrope_num_dims"):
        found[f"ModelConfig.{name}"] = attribute(config, name, "vllm")
        if not isinstance(found[f"ModelConfig.{name}"], property):
            raise lacking("vllm", f"ModelConfig.{name} that is a property")
    for name in _PROCESSOR:
        found[f"BaseMultiModalProcessor.{name}"] = attribute(processor, name, "vllm")
    for module, name in _RUNNERS:
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
    return found


def install(
    change: Callable[[type, Any], type], axes: Callable[[Any, int], int], positions_again: Callable[[Any], bool]
) -> None:
    """Put functions between vLLM and its models. Called again, it changes nothing.

    Args:
        change: takes the class that vLLM chose for a model and the ``ModelConfig``; returns the class that is used.
        axes: takes a ``ModelConfig`` and how many axes its positions have (0: they are no M-RoPE); returns how many
            rows the engine keeps for a position.
        positions_again: of a loaded model, whether it is asked for positions again when images were encoded.

    Raises:
        VersionError: something that is needed is missing. Nothing is changed then.
    """
    found = hooks()
    registry, config = find("vllm.model_executor.models.registry", "ModelRegistry"), find("vllm.config", "ModelConfig")
    if hasattr(registry, "_vlmrewrite"):
        return
    registry._vlmrewrite = True
    resolve = found["ModelRegistry.resolve_model_cls"]

    @functools.wraps(resolve)
    def resolve_model_cls(architectures: Any, model_config: Any) -> tuple[type, str]:
        chosen, name = resolve(architectures, model_config=model_config)
        return change(chosen, model_config), name

    registry.resolve_model_cls = resolve_model_cls
    uses, rows = found["ModelConfig.uses_mrope"].fget, found["ModelConfig.mrope_num_dims"].fget

    def now(self: Any) -> int:
        return axes(self, rows(self) if uses(self) else 0)

    config.uses_mrope = property(lambda self: now(self) > 0)
    config.mrope_num_dims = property(now)
    for module, name in _RUNNERS:
        kind = find(module, name)
        kind.load_model = _asked_again(found[f"{name}.load_model"], positions_again)
    _second_runner(positions_again)


def _asked_again(load: Callable[..., Any], positions_again: Callable[[Any], bool]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = load(self, *args, **kwargs)
        if positions_again(self.get_model()):
            self.is_multimodal_pruning_enabled = True
        return made

    return load_model


def _second_runner(positions_again: Callable[[Any], bool]) -> None:
    """The same in vLLM's second model runner, where it can be imported."""
    module, name = _PRUNER
    try:
        place = importlib.import_module(module)
    except Exception:  # it needs Triton and a device of its own; the first runner is used then
        return
    make, kind = find(module, name), find("vllm.v1.worker.gpu.model_states.mm_pruning", "MultiModalPruner")

    @functools.wraps(make)
    def maybe_create_mm_pruner(model_config: Any, model: Any, rope_state: Any, encoder_cache: Any) -> Any:
        if rope_state is None or encoder_cache is None or not positions_again(model):
            return make(model_config, model, rope_state, encoder_cache)
        return kind(model, rope_state, encoder_cache, model_config.get_inputs_embeds_size())

    setattr(place, name, maybe_create_mm_pruner)


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
    """How many positions the tables of a model's ropes have; None if it has no tables."""
    tables = [getattr(m, "cos_sin_cache", None) for m in model.modules()]
    return min((len(t) for t in tables if isinstance(t, Tensor)), default=None)
