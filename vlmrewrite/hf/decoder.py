"""The text decoder of a model: its layers, their parameters, and the configs its modules read."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.fx
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from vlmrewrite.compat import (
    attention_implementation,
    experts_implementation,
    set_attention_implementation,
    set_experts_implementation,
)


def decoder_layers(model: nn.Module) -> list[str]:
    """Names of the decoder's layers, as submodules of the model.

    Raises:
        ValueError: its text decoder has no list of as many modules as its config names layers.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    depth = model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[union-attr, operator]
    inside = {id(m) for m in decoder.modules()}
    for name, module in model.named_modules():
        if id(module) in inside and isinstance(module, nn.ModuleList) and len(module) == depth:
            return [f"{name}.{i}" for i in range(depth)]
    raise ValueError(f"{type(decoder).__name__} has no list of {depth} layers; expected one to copy a layer from")


def parameter_inputs(
    model: nn.Module, gm: torch.fx.GraphModule, inputs: Sequence[object]
) -> dict[str, tuple[int, str]]:
    """For each input of a captured graph that is a decoder layer's parameter, the layer and the name within it."""
    known = {
        id(p): (i, name)
        for i, layer in enumerate(decoder_layers(model))
        for name, p in model.get_submodule(layer).named_parameters()
    }
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    return {name: known[id(x)] for name, x in zip(names, inputs, strict=True) if id(x) in known}


IMPLEMENTATION = "vlmrewrite"

EXPERTS = {own: f"{IMPLEMENTATION}-{own}" for own in ("eager", "grouped_mm", "batched_mm")}
"""What is used in place of each of transformers' own ways to run experts, where vlmrewrite's attention is."""

_COPIES: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, int], tuple[Any, Any]]] = weakref.WeakKeyDictionary()


def decoder_configs(model: nn.Module) -> list[Any]:
    """The distinct config objects that the text decoder's modules read their attention implementation from."""
    decoder = model.get_decoder()  # type: ignore[operator]
    found = {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}
    text = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    return list((found | {id(text): text}).values())


@contextlib.contextmanager
def attention_swapped(model: nn.Module, name: str = IMPLEMENTATION, blocks: Iterable[nn.Module] = ()) -> Iterator[None]:
    """:func:`swap_attention`, undone at the end of the block."""
    undo = swap_attention(model, name, blocks)
    try:
        yield
    finally:
        undo()


def swap_attention(
    model: nn.Module, name: str = IMPLEMENTATION, blocks: Iterable[nn.Module] = ()
) -> Callable[[], None]:
    """Use another attention implementation in the text decoder of this model, and of no other.

    Its experts go the same way: by vlmrewrite's operators, or else by the class's own code.

    Its modules, and those that hold it and make its masks, get copies of their configs: a config object may be another
    model's too. The model's own ``config`` stays as it is. The same copies are given each time, so that graphs that
    were captured with them stay valid.

    Args:
        blocks: modules beside the model's that shall use it too.

    Returns:
        what undoes it: a call that can be copied with the model, see :class:`vlmrewrite.hf.Undo`.

    Raises:
        ValueError: vlmrewrite's is used there already, on behalf of another model, or in a module that was copied or
            taken from one.
    """
    roots = [model, *blocks]
    decoder: Any = model.get_decoder()  # type: ignore[operator]
    inside = {id(m) for root in (decoder, *blocks) for m in root.modules()}
    modules = [m for root in roots for m in root.modules() if m is not model and "config" in vars(m)]
    modules = [m for m in modules if id(m) in inside or any(x is decoder for x in m.modules())]
    if name == IMPLEMENTATION:
        _refuse_used(model)
    read = decoder_configs(model) + [m.config for block in roots[1:] for m in block.modules() if "config" in vars(m)]
    copies = {id(c): _private(model, name, c) for c in {id(c): c for c in read}.values()}
    for copied in copies.values():
        set_attention_implementation(copied, name)
        own = experts_implementation(copied) or "eager"
        set_experts_implementation(copied, EXPERTS[own] if name == IMPLEMENTATION else "eager")
    around = {id(m.config): m.config for m in modules if id(m.config) not in copies}
    for key, config in around.items():
        parts = {attribute: copies[id(c)] for attribute, c in vars(config).items() if id(c) in copies}
        if parts:
            copies[key] = _private(model, name, config)
            vars(copies[key]).update(parts)
    known = _COPIES[model]
    for stale in [key for key in known if key[0] == name and key[1] not in copies]:  # of blocks, of replaced configs
        del known[stale]
    bare = [m for root in (decoder, *blocks) for m in root.modules() if name == IMPLEMENTATION and _bare_experts(m)]
    for module in bare:
        vars(module).update(_AS_DECORATED, forward=types.MethodType(_experts, module))
    before = [(m, m.config) for m in modules if id(m.config) in copies]
    for module, config in before:
        vars(module)["config"] = copies[id(config)]

    return functools.partial(_give_back, before, bare)


def _give_back(before: list[tuple[nn.Module, Any]], bare: list[nn.Module]) -> None:
    for module, config in before:
        vars(module)["config"] = config
    for module in bare:
        for attribute in (*_AS_DECORATED, "forward"):
            vars(module).pop(attribute, None)


_AS_DECORATED = {
    "has_gate": True,
    "has_bias": False,
    "has_post_expert_norm": False,
    "is_transposed": False,
    "_is_expert_parallel": False,
}
"""What transformers' interface says of experts that go through it."""


def _bare_experts(module: nn.Module) -> bool:
    """Whether a module holds experts in the form of transformers' interface, and does not go through it."""
    weights = dict(module.named_parameters())
    if weights.keys() != {"gate_up_proj", "down_proj"} or any(w.dim() != 3 for w in weights.values()):
        return False
    changed = "forward" in vars(module) or hasattr(type(module).forward, "__wrapped__")
    if changed or not hasattr(module, "_apply_gate"):
        return False
    (_, both, size), (_, back, inner) = (weights[name].shape for name in ("gate_up_proj", "down_proj"))
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return (both, size) == (2 * inner, back) and names == ["hidden_states", "top_k_index", "top_k_weights"]


def _experts(module: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """The forward of such experts, through the interface."""
    function = ALL_EXPERTS_FUNCTIONS.get_interface(EXPERTS["eager"], type(module).forward)
    return function(module, hidden_states, top_k_index, top_k_weights)


def _refuse_used(model: nn.Module) -> None:
    """Raise what :func:`swap_attention` raises."""
    found = [(path, m) for path, m in model.named_modules() if m is not model and "config" in vars(m)]
    for path, module in found:
        if attention_implementation(module.config) != IMPLEMENTATION:
            continue
        others = [known for other, known in list(_COPIES.items()) if other is not model]
        if any(module.config is copied for known in others for _, copied in known.values()):
            raise ValueError(
                f"another model, that a recipe is applied to, has modules of this {type(model).__name__} too: call"
                " vlmrewrite.restore on it first"
            )
        raise ValueError(
            f"{path} of this {type(model).__name__}, a {type(module).__name__}, has vlmrewrite's attention in its"
            " config: it was copied while a recipe was applied, or taken from such a model; expected one of a restored"
            " model"
        )


def _private(model: nn.Module, name: str, config: Any) -> Any:
    known = _COPIES.setdefault(model, {})
    original, copied = known.get((name, id(config)), (None, None))
    if original is not config:
        copied = copy.copy(config)
        known[name, id(config)] = config, copied
    vars(copied).clear()
    vars(copied).update(vars(config))
    return copied
