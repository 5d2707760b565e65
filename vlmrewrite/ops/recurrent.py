"""A recurrent or convolutional layer's token mixer as one operator: the model's own module, with its state as tensors.

Its loops over chunks, and its writes to the cache, stay behind the operator: one graph serves all lengths, and runs the
module on whichever tokens a layer is to run on.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vlmrewrite.hf import cache_layers, decoder_layers, feedforward_layers, indexed_mixers, recurrent_mixers
from vlmrewrite.ops.gradients import differentiate
from vlmrewrite.ops.indexed import indexed_forward
from vlmrewrite.ops.library import define
from vlmrewrite.ops.mixers import FEEDFORWARD, MIXERS, Mixer, fill, numbered
from vlmrewrite.ops.selection import select


def recurrent(
    hidden: Tensor,
    mask: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    mixer: int,
    plain: bool,
) -> list[Tensor]:
    """What a recurrent or convolutional module makes of some tokens, in order, after those that its states have seen.

    Args:
        hidden: [B, n, H].
        mask: bool or int [B, n], or None. If ``plain``, the padding mask that the model gives the module, which treats
            padding as it does. Else the tokens that are there: each row's alone go through the module, one behind the
            other, and neither its output nor its states depend on the others.
        states: what the layer's cache holds, [B, ...] each; empty for an empty cache.
        weights: the module's parameters, in order.
        mixer: which module.
        plain: see ``mask``.

    Returns:
        [B, n, H], 0 for tokens that are not there, but at the entry of a feed-forward layer; then the new states.
    """
    module = MIXERS[mixer]
    if plain or mask is None or mixer == FEEDFORWARD:
        return module.run(hidden, mask, states, weights)  # type: ignore[no-any-return]
    out = [torch.zeros_like(x) for x in _recurrent_fake(hidden, mask, states, weights, mixer, plain)]
    out[1:] = [s.clone() for s in states] or out[1:]
    there = mask.bool()
    counts = there.sum(1)
    for n in (n for n in counts.unique().tolist() if n):
        rows = (counts == n).nonzero()[:, 0]
        index = there[rows].nonzero()[:, 1].view(-1, n)
        part = module.run(select(hidden[rows], index), None, [s[rows] for s in states], weights)
        out[0][rows[:, None], index] = part[0]
        for whole, new in zip(out[1:], part[1:], strict=True):
            whole[rows] = new
    return out


def _recurrent_fake(
    hidden: Tensor,
    mask: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    mixer: int,
    plain: bool,
) -> list[Tensor]:
    out, *held = MIXERS[mixer].made_of(hidden)
    return [hidden.new_empty(hidden.shape, dtype=out.dtype)] + [
        hidden.new_empty((hidden.shape[0], *s.shape[1:]), dtype=s.dtype) for s in held
    ]


_ARGUMENTS = "Tensor hidden, Tensor? mask, Tensor[] states, Tensor[] weights, int mixer, bool plain"

define(f"recurrent({_ARGUMENTS}) -> Tensor[]", recurrent, _recurrent_fake)

differentiate("recurrent", _ARGUMENTS, recurrent)

RECURRENT = torch.ops.vlm.recurrent.default


def swap_mixers(model: nn.Module) -> Callable[[], None]:
    """Let the recurrent layers of this model be captured as one :func:`recurrent` operator each.

    In the layers that are feed-forward alone, one that does nothing stands at the entry. Where nothing is traced, both
    run as they are. Layers with an index over their keys go by :mod:`vlmrewrite.ops.indexed`, traced or not.

    Returns:
        what undoes it: a call that can be copied with the model.
    """
    layers, found = cache_layers(model), recurrent_mixers(model)
    text: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    modules, mixers = list(found.values()), [_mixer(m, layers[i].number_of_states) for i, m in found.items()]
    for mixer in mixers:
        mixer.probe(int(text.hidden_size))
    forwards = [_forward_of(mixer, type(m).forward) for mixer, m in zip(mixers, modules, strict=True)]
    idle = feedforward_layers(model, layers)
    alone = [model.get_submodule(name) for i, name in enumerate(decoder_layers(model)) if i in idle]
    modules, forwards = [*modules, *alone], [*forwards, *map(_entered, alone)]
    for module, index in indexed_mixers(model).values():
        modules, forwards = [*modules, module], [*forwards, indexed_forward(module, index)]
    before = [vars(m).get("forward") for m in modules]
    for module, forward in zip(modules, forwards, strict=True):
        vars(module)["forward"] = types.MethodType(forward, module)

    return functools.partial(_give_back, modules, before)


def _mixer(module: nn.Module, states: int) -> Mixer:
    """What is known of a module, for whose layer transformers' cache has so many states of each kind."""
    return numbered(module, lambda number: Mixer(module, number, states))


def _give_back(modules: list[nn.Module], before: list[Any]) -> None:
    for module, own in zip(modules, before, strict=True):
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


@contextlib.contextmanager
def mixers_swapped(model: nn.Module) -> Iterator[None]:
    """:func:`swap_mixers`, undone at the end of the block."""
    undo = swap_mixers(model)
    try:
        yield
    finally:
        undo()


def _entered(layer: nn.Module) -> Callable[..., Any]:
    """A feed-forward layer's forward, that leaves an operator behind at its entry where it is traced."""
    own = type(layer).forward

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return own(self, *args, **kwargs)
        stream, *rest = args or (kwargs.pop("hidden_states"),)
        return own(self, RECURRENT(stream, None, [], [], FEEDFORWARD, True)[0], *rest, **kwargs)

    return forward


def _forward_of(mixer: Mixer, own: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward, that leaves one operator behind where it is traced."""
    names, number, slots, cached = tuple(inspect.signature(own).parameters)[1:], mixer.number, mixer.slots, mixer.cache

    @functools.wraps(own)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return own(self, *args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden, cache = given.pop("hidden_states"), given.pop(cached)
        mask = given.pop("attention_mask", None)
        kind = hidden.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):  # the dtypes of states would not be those of the probe
            raise NotImplementedError("a recurrent layer cannot be captured under torch.autocast: leave it")
        for name, x in given.items():
            if isinstance(x, Tensor) and x.dim():
                raise NotImplementedError(f"a recurrent layer is given {name}, which is not known to follow its tokens")
        layer = cache.layers[self.layer_idx]
        states = [getattr(layer, kind)[i] for kind, i in slots if layer.has_previous_state[i]]
        out, *new = RECURRENT(hidden, mask, states, list(self.parameters()), number, True)
        for (kind, i), state in zip(slots, new, strict=True):
            fill(layer, kind, i, state)
        return out

    return forward
