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

from vlmrewrite.hf import cache_layers, recurrent_mixers
from vlmrewrite.ops.library import define
from vlmrewrite.ops.mixers import MIXERS, Mixer, fill, mixer_for
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
        [B, n, H], 0 for tokens that are not there; then the new states.
    """
    module = MIXERS[mixer]
    if plain or mask is None:
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
    made = MIXERS[mixer].made
    if hidden.dtype not in made:
        raise RuntimeError(
            f"the hidden states of a recurrent layer are {hidden.dtype}; expected {list(made)}, that of the model's"
            " parameters: restore the model and apply the recipe again after a cast"
        )
    out, *held = made[hidden.dtype]
    return [hidden.new_empty(hidden.shape, dtype=out.dtype)] + [
        hidden.new_empty((hidden.shape[0], *s.shape[1:]), dtype=s.dtype) for s in held
    ]


define(
    "recurrent(Tensor hidden, Tensor? mask, Tensor[] states, Tensor[] weights, int mixer, bool plain) -> Tensor[]",
    recurrent,
    _recurrent_fake,
)

RECURRENT = torch.ops.vlm.recurrent.default


def recurrent_backward(
    gradients: list[Tensor | None],
    hidden: Tensor,
    mask: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    mixer: int,
    plain: bool,
    wanted: list[bool],
) -> list[Tensor]:
    """The gradient of :func:`recurrent`, which is computed again; an operator, so that no compiler looks into it.

    Args:
        gradients: of what it returned; None where there is none.
        hidden, mask, states, weights, mixer, plain: what it was given.
        wanted: of the hidden states, each state and each parameter, whether a gradient is.

    Returns:
        those gradients, in order.
    """
    with torch.enable_grad():
        given = [x.detach().requires_grad_(asked) for x, asked in zip((hidden, *states, *weights), wanted, strict=True)]
        n = 1 + len(states)
        made = recurrent(given[0], mask, given[1:n], given[n:], mixer, plain)
    pairs = [(o, g) for o, g in zip(made, gradients, strict=True) if g is not None and o.requires_grad]
    leaves = [x for x in given if x.requires_grad]
    outs, grads = [o for o, _ in pairs], [g for _, g in pairs]
    found = torch.autograd.grad(outs, leaves, grads, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.contiguous() for x, g in zip(leaves, found, strict=True)]


def _backward_fake(
    gradients: list[Tensor | None],
    hidden: Tensor,
    mask: Tensor | None,
    states: list[Tensor],
    weights: list[Tensor],
    mixer: int,
    plain: bool,
    wanted: list[bool],
) -> list[Tensor]:
    every = zip((hidden, *states, *weights), wanted, strict=True)
    return [x.new_empty(x.shape) for x, asked in every if asked]


define(
    "recurrent_backward(Tensor?[] gradients, Tensor hidden, Tensor? mask, Tensor[] states, Tensor[] weights, int mixer,"
    " bool plain, bool[] wanted) -> Tensor[]",
    recurrent_backward,
    _backward_fake,
)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, mask, states, weights, *ctx.rest = inputs
    ctx.wanted, ctx.states, ctx.masked = [x.requires_grad for x in (hidden, *states, *weights)], len(states), mask
    ctx.save_for_backward(hidden, *states, *weights)


def _backward(ctx: Any, gradients: list[Tensor | None]) -> Any:
    hidden, *more = ctx.saved_tensors
    n = ctx.states
    given = gradients, hidden, ctx.masked, more[:n], more[n:], *ctx.rest, ctx.wanted
    found = iter(torch.ops.vlm.recurrent_backward.default(*given))
    first, *others = [next(found) if asked else None for asked in ctx.wanted]
    return first, None, others[:n], others[n:], None, None


torch.library.register_autograd("vlm::recurrent", _backward, setup_context=_remember)


def swap_mixers(model: nn.Module) -> Callable[[], None]:
    """Let the recurrent layers of this model be captured as one :func:`recurrent` operator each.

    Where nothing is traced, they run as they are.

    Returns:
        what undoes it: a call that can be copied with the model.
    """
    layers, found = cache_layers(model), recurrent_mixers(model)
    text: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    modules, mixers = list(found.values()), [mixer_for(m, layers[i].number_of_states) for i, m in found.items()]
    before = [vars(m).get("forward") for m in modules]
    for mixer in mixers:
        mixer.probe(int(text.hidden_size))
    for module, mixer in zip(modules, mixers, strict=True):
        vars(module)["forward"] = types.MethodType(_forward_of(mixer, type(module).forward), module)

    return functools.partial(_give_back, modules, before)


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
            if isinstance(x, Tensor):
                raise NotImplementedError(f"a recurrent layer is given {name}, which is not known to follow its tokens")
        layer = cache.layers[self.layer_idx]
        states = [getattr(layer, kind)[i] for kind, i in slots if layer.has_previous_state[i]]
        out, *new = RECURRENT(hidden, mask, states, list(self.parameters()), number, True)
        for (kind, i), state in zip(slots, new, strict=True):
            fill(layer, kind, i, state)
        return out

    return forward
