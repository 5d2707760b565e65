"""The two functions that transformers calls for attention and masks, registered under one name.

While tracing, they leave one ``vlm::attention`` node per decoder layer; run eagerly, they compute the same attention
from the positions that the cache carries. Decoding needs nothing else: the cache already holds what each layer may see.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from vlmrewrite import ops
from vlmrewrite.compat import apply_gate, experts_apart
from vlmrewrite.hf import EXPERTS, IMPLEMENTATION
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.ops import Kernels, unfit

_RUNNING: ContextVar[tuple[PositionCache | None, Kernels | None]] = ContextVar("vlmrewrite_cache", default=(None, None))
"""The cache of the uncaptured forward that is running, and which kernels its attention may run as."""


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' ``AttentionInterface``: q [B, H, t, D], k and v [B, Hk, m, D].

    Its arguments are in the order of transformers' own: some libraries wrap all that are registered, and call by place.
    """
    for name in ("s_aux", "position_bias", "output_attentions"):
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(f"vlmrewrite's attention has no {name}, which {type(module).__name__} passes")
    causal = getattr(module, "is_causal", True) and kwargs.get("is_causal") is not False
    full = attention_mask is not None and attention_mask.dim() == 4
    if not (causal or full or query.shape[2] == 1):
        raise NotImplementedError(
            f"{type(module).__name__} asks for bidirectional attention and has no mask [B, 1, Q, K] that says who sees"
            " whom; expected such a mask, or a causal decoder (does the call lack token_type_ids?)"
        )
    given = (query, key, value, attention_mask, None, None, scaling, attention_mask is None, softcap)
    if torch.compiler.is_dynamo_compiling():
        return ops.ATTENTION(*given, float(dropout)), None
    cache, kernels = _RUNNING.get()
    layer = None if cache is None else cache.layer_of(key)
    if cache is None or layer is None:
        if query.shape[2] != key.shape[2]:
            raise RuntimeError(
                f"{key.shape[2]} keys for {query.shape[2]} queries that are not those of vlmrewrite's cache: this model"
                " attends to other keys than those that its cache holds, or it is not rewritten and shares its decoder"
                " with one that is (call vlmrewrite.restore on that one)"
            )
        return ops.attention(*given, dropout), None
    if kernels is not None and unfit(query, value, dropout, kernels, f"layer {module.layer_idx}") is None:
        look = ops.kernel_mask if softcap is None else ops.kernel_mask_softcapped
        what = cache.seen_by(layer, query, attention_mask, look)
        return ops.kernel_attention(query, key, value, what, scaling, softcap), None
    plain = layer.plainly(query.shape[2], attention_mask)
    seen = None if plain else cache.seen_by(layer, query, attention_mask, ops.visible)
    return ops.attend(query, key, value, seen, scaling, softcap, dropout), None


def mask_forward(
    mask_function: Callable[..., Any] = causal_mask_function, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor | None:
    """Mask function for transformers' ``AttentionMaskInterface``, which names all its arguments.

    Args:
        mask_function: the pattern.
        attention_mask: the padding bits [B, kv_length], or None.
        **kwargs: the lengths and whatever else transformers' ``sdpa_mask`` takes.

    Returns:
        for a plain causal mask, the padding bits [B, kv_length] (None if there is no padding); for every other
        pattern, bool [B, 1, q_length, kv_length] in logical positions.
    """
    if mask_function is causal_mask_function:
        if attention_mask is None or torch.compiler.is_dynamo_compiling():  # first: Dynamo is to guard on nothing else
            return attention_mask
        looked_at = _RUNNING.get()[0] is not None
        return attention_mask if looked_at or not bool(attention_mask.all()) else None
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "use_vmap": False}
    return sdpa_mask(mask_function=mask_function, attention_mask=attention_mask, **kwargs)


def experts_forward(own: str, module: Any, hidden_states: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """Experts function for transformers' ``ExpertsInterface``; run eagerly, it is the model's own.

    Args:
        own: which of transformers' implementations the model uses.
        module: the experts.
        hidden_states: [N, H].
        experts: of each token, int64 [N, k].
        weights: of each of them, [N, k].

    Returns:
        [N, H], dtype of ``hidden_states``.
    """
    if not torch.compiler.is_dynamo_compiling():
        eager = getattr(type(module).forward, "__wrapped__", type(module).forward)
        out: Tensor = ALL_EXPERTS_FUNCTIONS.get_interface(own, eager)(module, hidden_states, experts, weights)
        return out
    if experts_apart(module):
        raise NotImplementedError(f"{type(module).__name__} has its experts on several devices; expected all on one")

    def linear(x: Tensor, name: str) -> Any:
        bias = getattr(module, f"{name}_bias") if module.has_bias else None
        return ops.EXPERT_LINEAR(x, experts, getattr(module, name), bias, module.is_transposed)

    x: Tensor = linear(hidden_states, "gate_up_proj" if module.has_gate else "up_proj")
    x = linear(apply_gate(module, x) if module.has_gate else module.act_fn(x), "down_proj")
    if module.has_post_expert_norm:
        x = module.post_expert_norm(x)
    return (x * weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def register() -> None:
    """Make the implementations known to transformers; idempotent."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_forward)
    for own, name in EXPERTS.items():
        if name not in ALL_EXPERTS_FUNCTIONS:
            ALL_EXPERTS_FUNCTIONS.register(name, functools.partial(experts_forward, own))


@contextlib.contextmanager
def running(cache: PositionCache | None, kernels: Kernels | None = None) -> Iterator[None]:
    """While an uncaptured forward runs with ``cache``.

    Args:
        kernels: ``"triton"`` or ``"auto"``: its attention runs as kernels, where it can; otherwise as plain PyTorch.
    """
    if cache is not None:
        cache.begin()
    token = _RUNNING.set((cache, kernels))
    try:
        yield
    finally:
        _RUNNING.reset(token)
        if cache is not None:
            cache.end()
