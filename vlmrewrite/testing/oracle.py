"""The oracle: what a plan means, as the unrewritten model plus masks.

Every layer runs on the full sequence; its keys are additionally masked to the tokens it attends to, and its output is
written back only for the tokens it runs on. Module hooks on the eager model do that, and share no code with the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "vlmrewrite-oracle"


@dataclass(frozen=True)
class LayerMasks:
    """What one layer does: ``run`` and ``keys``, bool [B, T] in the logical sequence."""

    run: Tensor
    keys: Tensor


_KEYS: dict[int, Tensor] = {}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    seen = attention_mask & _KEYS[module.layer_idx][:, None, None, :]  # type: ignore[index]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1).nan_to_num(0.0)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _mask(**kwargs: Any) -> Tensor:
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(**kwargs)
    assert mask is not None
    return mask


@contextlib.contextmanager
def masked(model: nn.Module, layers: Sequence[LayerMasks]) -> Iterator[None]:
    """While the block runs, the model's uncached forward does what ``layers`` say, one entry a decoder layer.

    Raises:
        ValueError: the number of entries is not the number of decoder layers.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    if len(decoder.layers) != len(layers):
        raise ValueError(f"{len(layers)} layer masks for {len(decoder.layers)} decoder layers")
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    configs = {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}.values()
    before = [(c, c._attn_implementation_internal) for c in configs]
    handles = []
    for module, entry in zip(decoder.layers, layers, strict=True):
        attention = next(m for m in module.modules() if hasattr(m, "layer_idx"))
        _KEYS[attention.layer_idx] = entry.keys
        handles.append(module.register_forward_hook(_write_back(entry.run), with_kwargs=True))
    try:
        for config, _ in before:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for handle in handles:
            handle.remove()
        for config, name in before:
            config._attn_implementation_internal = name
        _KEYS.clear()


def _write_back(run: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        entered = args[0] if args else kwargs["hidden_states"]
        out = output[0] if isinstance(output, tuple) else output
        kept = torch.where(run[..., None], out, entered)
        return (kept, *output[1:]) if isinstance(output, tuple) else kept

    return hook


@torch.no_grad()
def oracle_logits(model: nn.Module, inputs: dict[str, Any], layers: Sequence[LayerMasks]) -> Tensor:
    """Logits [B, T, V] of the unrewritten model under masks.

    Args:
        inputs: what the model's forward takes; the attention mask is made explicit if it is missing.
    """
    inputs = dict(inputs)
    if inputs.get("attention_mask") is None:
        some = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
        inputs["attention_mask"] = torch.ones(some.shape, dtype=torch.int64, device=some.device)
    for name in ("past_key_values", "use_cache", "logits_to_keep"):
        inputs.pop(name, None)
    with masked(model, layers):
        return model(**inputs, use_cache=False).logits  # type: ignore[no-any-return]
