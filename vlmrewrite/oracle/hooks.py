"""The oracle: what a plan means, as the unrewritten model plus masks.

Every layer runs on the full sequence; its keys are additionally masked to the tokens it attends to, and its output is
written back only for the tokens it runs on. Module hooks on the eager model do that, and share no code with the graph.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from vlmrewrite.hf import attention_swapped
from vlmrewrite.oracle.edits import edited
from vlmrewrite.oracle.masks import BranchMask, EditMask, LayerMasks

NAME = "vlmrewrite-oracle"


class InFloat64(TorchFunctionMode):
    """While it is active, what casts to float32 casts to float64.

    Norms, rope and softmax of Hugging Face models compute in float32 whatever the model's dtype is; under this mode, a
    model in float64 computes in float64 throughout. Constants that a model makes in the default dtype stay as they are,
    like its parameters: they are the same numbers in both.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        wider = [torch.float64 if x is torch.float32 else x for x in args]
        return func(*wider, **{k: torch.float64 if x is torch.float32 else x for k, x in (kwargs or {}).items()})


@dataclass
class _State:
    """Of one run: each layer's keys, bool [B, T], and what the last attention module paid, [B, H, T, T]."""

    keys: dict[int, Tensor] = field(default_factory=dict)
    paid: Tensor | None = None


_STATE: ContextVar[_State] = ContextVar("vlmrewrite_oracle")

_IN_THE_MASK = {"sliding_window", "is_causal"}

_NOT_FOR_ATTENTION = {"position_ids", "cache_position", "use_cache", "output_hidden_states", "output_router_logits"}

_NOT_FOR_ATTENTION |= {"num_items_in_batch", "return_dict"}


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Eager attention in the order of operations of transformers' own: q [B, H, T, D] -> [B, T, H, Dv].

    Raises:
        NotImplementedError: the model asks for something that this function does not do.
    """
    for name in kwargs.keys() - _IN_THE_MASK - _NOT_FOR_ATTENTION:
        asked = kwargs[name]
        if asked is not None and (isinstance(asked, Tensor) or asked):
            raise NotImplementedError(f"the oracle's attention does not take {name}, {type(module).__name__} passes it")
    if attention_mask is None or attention_mask.dtype != torch.bool:
        found = None if attention_mask is None else attention_mask.dtype
        raise NotImplementedError(f"the oracle expects a bool mask, {type(module).__name__} passes {found}")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = attention_mask & _STATE.get().keys[module.layer_idx][:, None, None, :]  # type: ignore[index]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32).nan_to_num(0.0)
    _STATE.get().paid = weights
    return (weights.to(query.dtype) @ value).transpose(1, 2).contiguous(), None


def _mask(**kwargs: Any) -> Tensor:
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(**kwargs)
    assert mask is not None
    return mask


@contextlib.contextmanager
def masked(model: nn.Module, layers: Sequence[LayerMasks]) -> Iterator[None]:
    """While the block runs, the model's uncached forward does what ``layers`` say, one entry a decoder layer.

    Raises:
        ValueError: the number of entries is not the number of decoder layers, or a layer with an ``mlp`` mask has no
            one submodule that is its MLP.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    if len(decoder.layers) != len(layers):
        raise ValueError(f"{len(layers)} layer masks for {len(decoder.layers)} decoder layers")
    feeds = [None if e.mlp is None else mlp_of(m) for m, e in zip(decoder.layers, layers, strict=True)]
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    blocks = [b.block for entry in layers for b in entry.branches if b.block is not None]
    state = _State()
    handles = []
    away: dict[int, Tensor] = {}
    merged: list[Tensor | None] = []
    if any(entry.edits for entry in layers):
        handles.append(decoder.register_forward_pre_hook(_remember(merged), with_kwargs=True))
    for i, (module, entry, feed) in enumerate(zip(decoder.layers, layers, feeds, strict=True)):
        back = [b for earlier in layers[:i] for b in earlier.branches if b.rejoin == i]
        handles += [module.register_forward_pre_hook(_enter(_rejoin(b, away)), with_kwargs=True) for b in back]
        attention = next(m for m in module.modules() if hasattr(m, "layer_idx"))
        state.keys[attention.layer_idx] = entry.keys
        if entry.entry is not None:
            handles.append(module.register_forward_pre_hook(_enter(entry.entry), with_kwargs=True))
        for e in entry.edits:
            handles.append(module.register_forward_pre_hook(_edit(e, merged), with_kwargs=True))
        for b in entry.branches:
            handles.append(module.register_forward_pre_hook(_leave(b, away), with_kwargs=True))
            if b.rejoin == i:
                handles.append(module.register_forward_pre_hook(_enter(_rejoin(b, away)), with_kwargs=True))
        if feed is not None and entry.mlp is not None:
            handles.append(feed.register_forward_hook(_only(entry.mlp)))
        handles.append(module.register_forward_hook(_write_back(entry.run), with_kwargs=True))
    for b in (b for entry in layers for b in entry.branches if b.rejoin == len(layers)):
        handles.append(decoder.layers[-1].register_forward_hook(_behind(_rejoin(b, away))))
    token = _STATE.set(state)
    try:
        with attention_swapped(model, NAME, blocks):
            yield
    finally:
        _STATE.reset(token)
        for handle in handles:
            handle.remove()


def mlp_of(layer: nn.Module) -> nn.Module:
    """A decoder layer's MLP: the one child that holds weight matrices and no attention.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = {
        name: child
        for name, child in layer.named_children()
        if any(p.dim() > 1 for p in child.parameters()) and not any(hasattr(m, "layer_idx") for m in child.modules())
    }
    if len(found) != 1:
        raise ValueError(f"expected one child of {type(layer).__name__} to be its MLP, found {list(found) or 'none'}")
    return next(iter(found.values()))


def _enter(change: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    return hook


def _remember(merged: list[Tensor | None]) -> Any:
    """Note the embeddings that enter the decoder, the vision features merged into them."""

    def hook(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        merged[:] = [kwargs.get("inputs_embeds")]

    return hook


def _edit(edit: EditMask, merged: list[Tensor | None]) -> Any:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]

        def paid(keys: Tensor) -> Tensor:
            """Run the layer on the whole stream, its attention masked to ``keys``, for the weights alone."""
            index: Any = next(m for m in layer.modules() if hasattr(m, "layer_idx")).layer_idx
            state = _STATE.get()
            before, state.keys[index] = state.keys[index], keys
            layer.forward(*args, **kwargs)
            state.keys[index] = before
            assert state.paid is not None
            return state.paid

        new = edited(edit, stream, merged[0], paid)
        return _enter(lambda _: new)(layer, args, kwargs)

    return hook


def _leave(branch: BranchMask, away: dict[int, Tensor]) -> Any:
    """Run the branch's block on the whole stream, its attention masked to the branch's tokens, and remember."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered = args[0] if args else kwargs["hidden_states"]
        if branch.block is None:
            away[id(branch)] = entered
            return
        index: Any = next(m for m in layer.modules() if hasattr(m, "layer_idx")).layer_idx
        keys = _STATE.get().keys
        before, keys[index] = keys[index], branch.tokens
        out = branch.block(*args, **kwargs)
        keys[index] = before
        away[id(branch)] = out[0] if isinstance(out, tuple) else out

    return hook


def _rejoin(branch: BranchMask, away: dict[int, Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda stream: torch.where(branch.tokens[..., None], away[id(branch)], stream)


def _behind(change: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    return hook


def _only(tokens: Tensor) -> Any:
    """Zero the MLP's output [B, T, H] (or [B * T, H]) elsewhere: what is added to the stream there is nothing."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        out = output[0] if isinstance(output, tuple) else output
        out = torch.where(tokens.reshape(*out.shape[:-1], 1), out, 0.0)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    return hook


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
