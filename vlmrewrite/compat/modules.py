"""Private interfaces of tensors, modules, GPUs and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _module
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from vlmrewrite.compat.private import attribute, find, lacking


def memory_is_shared(x: Tensor, owners: int) -> bool:
    """Whether more than ``owners`` tensors refer to the memory of ``x``."""
    storage = x.untyped_storage()  # one reference more
    return int(find("torch._C", "_storage_Use_Count")(attribute(storage, "_cdata", "torch"))) > owners + 1


def memory_of(x: Tensor) -> int:
    """Which memory a tensor is in, fake or real: the same number for all views of it, as long as it lives."""
    return int(attribute(x.untyped_storage(), "_cdata", "torch"))


def record_outputs(model: nn.Module) -> None:
    """Let transformers' hooks for ``output_hidden_states`` stand on a model's parts.

    It puts them there at the first request, and cannot while Dynamo traces. Those of a part that has some are not put
    on it again with those of the whole.
    """
    install = find("transformers.utils.output_capturing", "maybe_install_capturing_hooks")
    known = find("transformers.utils.output_capturing", "_CAN_RECORD_REGISTRY")
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or not known.get(module):
            continue
        if not any(getattr(m, "_output_capturing_hooks_installed", False) for m in module.modules()):
            install(module)


def tokens_of_image(processor: Any, height: int, width: int) -> int | None:
    """How many tokens a processor makes of an image of some pixels; None if it is of a kind that does not count."""
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    return None if count is None else int(count(image_sizes=[(height, width)]).num_image_tokens[0])


def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    """What lies in nested lists, tuples and dicts, and how it lies there."""
    leaves, spec = find("torch.utils._pytree", "tree_flatten")(tree)
    return leaves, spec


def tree_unflatten(leaves: list[Any], spec: Any) -> Any:
    """What :func:`tree_flatten` took apart."""
    return find("torch.utils._pytree", "tree_unflatten")(leaves, spec)


def tree_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """What lies in nested lists, tuples and dicts.

    Args:
        is_leaf: what else is not to be looked into.
    """
    leaves: list[Any] = find("torch.utils._pytree", "tree_leaves")(tree, is_leaf=is_leaf)
    return leaves


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks of a module that run around its forward and its backward."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for name in names for hook in attribute(module, name, "torch").values()]


def global_hooks() -> int:
    """How many hooks there are on all modules. Traced code may ask: Dynamo guards on what is read."""
    return len(_module._global_forward_hooks) + len(_module._global_forward_pre_hooks)


def is_compiled(model: Any) -> bool:
    """Whether ``torch.compile(model)`` returned it, or ``model.compile()`` was called."""
    compiled, name = find("torch._dynamo", "OptimizedModule"), "_compiled_call_impl"
    attribute(nn.Module, name, "torch")
    return isinstance(model, compiled) or getattr(model, name, None) is not None


def initialise(module: nn.Module, model: nn.Module) -> None:
    """Give a module's parameters new values, as the model's class does."""
    module.apply(attribute(model, "_init_weights", "transformers"))


def gpu_sleep(cycles: int) -> None:
    """Let the current stream of the GPU do nothing for so many of its cycles."""
    find("torch.cuda", "_sleep")(cycles)


def gpu_architecture() -> int:
    """What Triton compiles for: 90 on Hopper."""
    return int(attribute(find("triton.runtime", "driver"), "active.get_current_target", "triton")().arch)


def attention_implementation(config: Any) -> str | None:
    """The attention implementation that modules with this config use."""
    name: str | None = attribute(config, "_attn_implementation", "transformers")
    return name


def set_attention_implementation(config: Any, name: str) -> None:
    """Let modules with this config use an attention implementation, and none of the configs inside it.

    (The public setter goes on to the inner configs, and checks what vlmrewrite's implementation need not meet.)
    """
    config._attn_implementation_internal = name
    if attention_implementation(config) != name:
        raise lacking("transformers", f"{type(config).__name__}._attn_implementation_internal")


def generation_inputs(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What ``generate()`` makes of a forward's arguments when one token more has been generated."""
    update = attribute(model, "_update_model_kwargs_for_generation", "transformers")
    longer: dict[str, Any] = update(ModelOutput(), dict(kwargs), is_encoder_decoder=False)
    return longer


def generation_positions(model: nn.Module, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The position ids that ``generate()`` would give a prompt."""
    positions: Tensor = attribute(model, "_prepare_position_ids_for_generation", "transformers")(input_ids, kwargs)
    return positions


def experts_implementation(config: Any) -> str | None:
    """What runs the experts of modules with this config."""
    name: str | None = attribute(config, "_experts_implementation", "transformers")
    return name


def set_experts_implementation(config: Any, name: str) -> None:
    """Let modules with this config run their experts so, and none of the configs inside it."""
    config._experts_implementation_internal = name
    if experts_implementation(config) != name:
        raise lacking("transformers", f"{type(config).__name__}._experts_implementation_internal")


def apply_gate(experts: Any, x: Tensor) -> Tensor:
    """What a module of experts makes of the gates and the values together, [..., 2 D] -> [..., D]. It can be traced."""
    gated: Tensor = experts._apply_gate(x)
    return gated


def experts_apart(experts: Any) -> bool:
    """Whether a module of experts holds some of them only, the others being on other devices. It can be traced."""
    return bool(experts._is_expert_parallel)


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Each group of rows of x [S, C] times a matrix of its own, weight [E, C, D]; group e ends before row ends[e].

    It can be differentiated, and compiled, in any dtype, on any device; the result [S, D] has the dtype of ``weight``.
    """
    if weight.dtype == torch.bfloat16 and all(n % 8 == 0 for n in weight.shape[1:]):
        return torch.nn.functional.grouped_mm(x.to(weight.dtype), weight, offs=ends)
    # PyTorch's own cannot be traced in other dtypes, nor where rows are not aligned
    by_group: Tensor = torch.ops.transformers.grouped_mm_fallback(x.to(weight.dtype), weight, ends)
    return by_group


def changes_of(tensor: Tensor) -> int:
    """How many times a tensor was written to in place."""
    return int(attribute(tensor, "_version", "torch"))
