"""The oracle: what a plan means, as the unrewritten model plus masks.

Every layer runs on the full sequence; its keys are additionally masked to the tokens it attends to, and its output is
written back only for the tokens it runs on. A recurrent layer has no keys to mask: its module runs on those tokens of
each row that the layer runs on, one row after the other, as if there were no others. So does one that attends to keys
which an index selects, on the tokens that are keys, and without padding. Module hooks on the eager model do that, and
share no code with the graph.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from vlmrewrite.hf import attention_swapped, decoder_layers, decoder_of, indexed_mixers, recurrent_mixers
from vlmrewrite.oracle.apart import row_by_row, rows_of_keys
from vlmrewrite.oracle.edits import edited
from vlmrewrite.oracle.masks import BranchMask, LayerMasks

NAME = "vlmrewrite-oracle"


@dataclass
class _State:
    """Of one run.

    Attributes:
        keys: each layer's, bool [B, T].
        paid: what the last attention module paid, [B, H, T, T].
        merged: the embeddings that entered the decoder, the vision features merged into them.
        away: for each branch, by its id, the stream [B, T, H] that its tokens are to be taken from.
    """

    keys: dict[int, Tensor] = field(default_factory=dict)
    paid: Tensor | None = None
    merged: Tensor | None = None
    away: dict[int, Tensor] = field(default_factory=dict)

    def rejoined(self, stream: Tensor, at: int, branches: Iterable[BranchMask]) -> Tensor:
        """The stream [B, T, H] with the tokens of those branches that rejoin at a layer."""
        for b in branches:
            if b.rejoin == at:
                stream = _where(b.tokens[..., None], self.away[id(b)], stream)
        return stream


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
    found = None if attention_mask is None else attention_mask.dtype
    if attention_mask is None or not (found == torch.bool or attention_mask.is_floating_point()):
        who = type(module).__name__
        raise NotImplementedError(f"the oracle expects a mask, bool or to be added, {who} passes {found}")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if attention_mask.is_floating_point():  # it is added, and its lowest numbers hide keys
        scores, attention_mask = scores + attention_mask, attention_mask > torch.finfo(attention_mask.dtype).min / 2
    keys = _STATE.get().keys[module.layer_idx].to(query.device)  # type: ignore[index]
    seen = attention_mask & keys[:, None, None, :]
    weights = scores.masked_fill(~seen, float("-inf")).softmax(-1, dtype=torch.float32).nan_to_num(0.0)
    _STATE.get().paid = weights
    return (weights.to(query.dtype) @ value).transpose(1, 2).contiguous(), None


def _mask(**kwargs: Any) -> Tensor | None:
    return sdpa_mask(**kwargs | {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


@contextlib.contextmanager
def masked(model: nn.Module, layers: Sequence[LayerMasks]) -> Iterator[None]:
    """While the block runs, the model's uncached forward does what ``layers`` say, one entry a decoder layer.

    Raises:
        ValueError: the number of entries is not the number of decoder layers, or a layer with an ``mlp`` mask has no
            one submodule that is its MLP.
    """
    decoder = model.get_decoder()  # type: ignore[operator]
    modules = [model.get_submodule(name) for name in decoder_layers(model)]
    if len(modules) != len(layers):
        raise ValueError(f"{len(layers)} layer masks for {len(modules)} decoder layers")
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _mask)
    blocks = [b.block for entry in layers for b in entry.branches if b.block is not None]
    state = _State()
    kinds = {type(m) for m in recurrent_mixers(model).values()}
    recurrent = [m for root in (model, *blocks) for m in root.modules() if type(m) in kinds]
    found = indexed_mixers(model)
    kinds = {type(m) for m, _ in found.values()}
    indexed = [m for x in (model, *blocks) for m in x.modules() if type(m) in kinds and m.layer_idx in found]

    def note(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        state.merged = kwargs.get("inputs_embeds")

    with contextlib.ExitStack() as stack:
        stack.enter_context(decoder.register_forward_pre_hook(note, with_kwargs=True))
        for i, (module, entry) in enumerate(zip(modules, layers, strict=True)):
            before, behind = _around(i, module, layers, state)
            stack.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            stack.enter_context(module.register_forward_hook(behind))
            if entry.mlp is not None:
                stack.enter_context(mlp_of(module).register_forward_hook(functools.partial(_only, entry.mlp)))
        for run, mixer in [(row_by_row, m) for m in recurrent] + [(rows_of_keys, m) for m in indexed]:
            own = vars(mixer)
            stack.callback(own.update, {name: own[name] for name in ("forward",) if name in own})
            stack.callback(own.pop, "forward")
            own["forward"] = functools.partial(run, mixer, state.keys)
        stack.callback(_STATE.reset, _STATE.set(state))
        stack.enter_context(attention_swapped(model, NAME, blocks))
        yield


def _meets_others(module: nn.Module) -> bool:
    """Whether it is a layer's attention or its like: it knows its layer and is told more than the stream."""
    return hasattr(module, "layer_idx") and len(inspect.signature(type(module).forward).parameters) > 2


def mlp_of(layer: nn.Module) -> nn.Module:
    """A decoder layer's MLP: the one child that holds weight matrices and no attention.

    Raises:
        ValueError: there is none, or more than one.
    """
    found = {
        name: child
        for name, child in layer.named_children()
        if any(p.dim() > 1 for p in child.parameters()) and not any(map(_meets_others, child.modules()))
    }
    if len(found) != 1:
        raise ValueError(f"expected one child of {type(layer).__name__} to be its MLP, found {list(found) or 'none'}")
    return next(iter(found.values()))


def _around(
    i: int, module: nn.Module, layers: Sequence[LayerMasks], state: _State
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What decoder layer ``i`` does, as a hook before it and a hook behind it."""
    entry, left = layers[i], [b for earlier in layers[:i] for b in earlier.branches]
    index: Any = next(m for m in module.modules() if hasattr(m, "layer_idx")).layer_idx
    state.keys[index] = entry.keys

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stream, *rest = args or (kwargs.pop("hidden_states"),)

        def through(run: Callable[..., Any], keys: Tensor) -> Any:
            """What a layer makes of the whole stream as it is now, its attention masked to ``keys``."""
            state.keys[index] = keys
            out = run(stream, *rest, **kwargs)
            state.keys[index] = entry.keys
            return out[0] if isinstance(out, tuple) else out

        def paid(keys: Tensor) -> Tensor:
            through(module.forward, keys)
            assert state.paid is not None
            return state.paid.to(keys.device)

        stream = state.rejoined(stream, i, left)
        if entry.entry is not None:
            stream = entry.entry(stream)
        for edit in entry.edits:
            home, merged = edit.tokens.device, state.merged
            found = edited(edit, stream.to(home), None if merged is None else merged.to(home), paid)
            stream = found.to(stream.device)
        for b in entry.branches:
            state.away[id(b)] = stream if b.block is None else through(b.block, b.tokens)
            stream = state.rejoined(stream, i, [b])
        return (stream, *rest), kwargs

    def behind(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        def kept(out: Tensor) -> Tensor:
            out = _where(entry.run[..., None], out, args[0])
            return state.rejoined(out, i + 1, (*left, *entry.branches)) if i + 1 == len(layers) else out

        return _changed(output, kept)

    return before, behind


def _where(which: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Some of x and the rest of y, on the device that the layer's output is on, or its input."""
    return torch.where(which.to(x.device), x, y.to(x.device))


def _changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with a change to the stream, which is all of it or comes first."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _only(tokens: Tensor, _: nn.Module, __: Any, output: Any) -> Any:
    """Zero the MLP's output [B, T, H] (or [B * T, H]) elsewhere: what is added to the stream there is nothing."""
    return _changed(output, lambda out: torch.where(tokens.reshape(*out.shape[:-1], 1).to(out.device), out, 0.0))


@contextlib.contextmanager
def positioned(model: nn.Module, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What to call a model's forward with, while the block runs, so that its decoder gets the ``position_ids``.

    A forward that does not take them by name may hand them to any of its parts: there, the decoder is given them.
    """
    if "position_ids" not in inputs or "position_ids" in inspect.signature(model.forward).parameters:
        yield inputs
        return
    given = {"position_ids": inputs["position_ids"]}
    decoder = decoder_of(model)
    handle = decoder.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | given), with_kwargs=True)
    try:
        yield {name: x for name, x in inputs.items() if name != "position_ids"}
    finally:
        handle.remove()


@torch.no_grad()
def oracle_logits(model: nn.Module, inputs: dict[str, Any], layers: Sequence[LayerMasks]) -> Tensor:
    """Logits [B, T, V] of the unrewritten model under masks.

    Args:
        inputs: what the model's forward takes; the attention mask is made explicit if it is missing.
    """
    inputs = {k: v for k, v in inputs.items() if k not in ("past_key_values", "use_cache", "logits_to_keep")}
    if inputs.get("attention_mask") is None:
        some = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
        inputs["attention_mask"] = torch.ones(some.shape, dtype=torch.int64, device=some.device)
    with masked(model, layers), positioned(model, inputs) as inputs:
        return model(**inputs, use_cache=False).logits  # type: ignore[no-any-return]
