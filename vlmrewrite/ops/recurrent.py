"""A recurrent or convolutional layer's token mixer as one operator: the model's own module, with its state as tensors.

Its loops over chunks, and its writes to the cache, stay behind the operator: one graph serves all lengths, and runs the
module on whichever tokens a layer is to run on.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from vlmrewrite.hf import cache_argument, cache_layers, recurrent_mixers
from vlmrewrite.ops.library import define
from vlmrewrite.ops.selection import select

_MIXERS: dict[int, Mixer] = {}
"""By the number that graphs hold; an entry dies with its module."""

_NUMBERS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

_NEXT = itertools.count()


class Mixer:
    """What is known of a module that mixes tokens by way of a state.

    Attributes:
        number: under which operators name it.
        slots: its states, each by the attribute of transformers' cache layer and the place in it.
        made: by the dtype of the hidden states, what one token makes: the output's dtype, then each state [1, ...].
    """

    def __init__(self, module: nn.Module, number: int, states: int) -> None:
        self._module, self.number, self._states_of = weakref.ref(module), number, states
        self.cache = str(cache_argument(module))
        self.slots: tuple[tuple[str, int], ...] = ()
        self.made: dict[torch.dtype, list[Tensor]] = {}

    def probe(self, width: int) -> None:
        """See what one token makes of an empty state; no hook of the model's is called, and no random number drawn."""
        module: Any = self._module()
        weight = next(p for p in module.parameters() if p.is_floating_point())
        if weight.dtype in self.made:
            return
        hidden = torch.zeros(1, 1, width, dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            layer = self._layer([])
            out = self._call(_copied(module, None), hidden, None, layer)
            held = [(kind, i) for i in range(layer.number_of_states) for kind in ("conv_states", "recurrent_states")]
            self.slots = tuple((kind, i) for kind, i in held if getattr(layer, kind)[i] is not None)
            self.made[weight.dtype] = [out, *self._states(layer)]

    def run(self, hidden: Tensor, mask: Tensor | None, states: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
        """What the module makes of hidden states [B, n, H] and its states: its output [B, n, H], then new states."""
        module: Any = self._module()
        names = (name for name, _ in module.named_parameters())
        layer = self._layer(states)
        out = self._call(_copied(module, dict(zip(names, weights, strict=True))), hidden, mask, layer)
        return [out, *self._states(layer)]

    def _layer(self, states: Sequence[Tensor]) -> Any:
        layer: Any = LinearAttentionLayer(self._states_of)
        for (kind, i), state in zip(self.slots, states, strict=bool(states)):
            fill(layer, kind, i, state.clone())  # modules write to it in place
        return layer

    def _states(self, layer: Any) -> list[Tensor]:
        return [getattr(layer, kind)[i].clone() for kind, i in self.slots]  # without transformers' mark for cudagraphs

    def _call(self, module: Any, hidden: Tensor, mask: Tensor | None, layer: Any) -> Tensor:
        cache = Cache(layers=[layer] * (module.layer_idx + 1))
        out: Tensor = type(module).forward(module, hidden, **{self.cache: cache, "attention_mask": mask})
        return out


def fill(layer: Any, kind: str, i: int, state: Tensor) -> None:
    """Put a state into transformers' cache layer."""
    getattr(layer, kind)[i] = state
    getattr(layer, f"is_{kind}_initialized")[i] = layer.has_previous_state[i] = True
    layer.dtype, layer.device = state.dtype, state.device
    if kind == "conv_states":
        layer.conv_kernel_size[i] = state.shape[-1]


def _copied(module: nn.Module, weights: dict[str, Tensor] | None, prefix: str = "") -> nn.Module:
    """The module with other parameters; without any, with its own, in eval mode and without hooks."""
    made = type(module).__new__(type(module))
    vars(made).update(vars(module))
    if weights is None:
        vars(made).update({name: OrderedDict() for name in vars(module) if name.endswith("_hooks")}, training=False)
    else:
        own = {name: weights[prefix + name] if p is not None else None for name, p in module._parameters.items()}
        vars(made)["_parameters"] = own
    children = module._modules.items()
    vars(made)["_modules"] = {n: m and _copied(m, weights, f"{prefix}{n}.") for n, m in children}
    return made


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
    module = _MIXERS[mixer]
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
    made = _MIXERS[mixer].made
    if hidden.dtype not in made:
        raise RuntimeError(
            f"the hidden states of a recurrent layer are {hidden.dtype}; expected {list(made)}, that of the model's"
            " parameters: leave torch.autocast, or restore the model and apply the recipe again after a cast"
        )
    out, *held = made[hidden.dtype]
    return [hidden.new_empty(hidden.shape, dtype=out.dtype)] + [
        hidden.new_empty((hidden.shape[0], *s.shape[1:]), dtype=s.dtype) for s in held
    ]


define(
    "recurrent(Tensor hidden, Tensor? mask, Tensor[] states, Tensor[] weights, int mixer, bool plain) -> Tensor[]",
    recurrent,
    _recurrent_fake,
    backward=True,
)

RECURRENT = torch.ops.vlm.recurrent.default


def swap_mixers(model: nn.Module) -> Callable[[], None]:
    """Let the recurrent layers of this model be captured as one :func:`recurrent` operator each.

    Where nothing is traced, they run as they are.

    Returns:
        what undoes it.
    """
    layers, found = cache_layers(model), recurrent_mixers(model)
    text: Any = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    modules = list(found.values())
    before = [vars(m).get("forward") for m in modules]
    for i, module in found.items():
        if module not in _NUMBERS:
            _NUMBERS[module] = number = next(_NEXT)
            _MIXERS[number] = Mixer(module, number, layers[i].number_of_states)
            weakref.finalize(module, _MIXERS.pop, number, None).atexit = False
        mixer = _MIXERS[_NUMBERS[module]]
        mixer.probe(int(text.hidden_size))
        vars(module)["forward"] = types.MethodType(_forward_of(mixer, type(module).forward), module)

    def undo() -> None:
        for module, own in zip(modules, before, strict=True):
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own

    return undo


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
