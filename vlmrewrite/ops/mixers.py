"""Modules that mix tokens by way of a state, called as functions: of tokens, states and parameters."""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, LinearAttentionLayer

from vlmrewrite.hf import cache_argument

MIXERS: dict[int, Any] = {}
"""By the number that graphs hold; an entry dies with its module."""

FEEDFORWARD = -1
"""The number of :class:`Through`."""

_NUMBERS: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()

_NEXT = itertools.count()


class Named:
    """A module that operators name by a number.

    Attributes:
        number: that.
        cache: the name under which its forward takes the cache.
    """

    def __init__(self, module: nn.Module, number: int) -> None:
        self.module, self.number = weakref.ref(module), number
        self.cache = str(cache_argument(module))


class Mixer(Named):
    """What is known of a module that mixes tokens by way of a state.

    Attributes:
        slots: its states, each by the attribute of transformers' cache layer and the place in it.
        made: by the dtype of the hidden states, what one token makes: the output's dtype, then each state [1, ...].
    """

    def __init__(self, module: nn.Module, number: int, states: int) -> None:
        super().__init__(module, number)
        self._states_of = states
        self.slots: tuple[tuple[str, int], ...] = ()
        self.made: dict[torch.dtype, list[Tensor]] = {}

    def made_of(self, hidden: Tensor) -> list[Tensor]:
        """What one token of hidden states makes, empty.

        Raises:
            RuntimeError: they are of another dtype than the parameters were.
        """
        if hidden.dtype not in self.made:
            raise RuntimeError(
                f"the hidden states of a recurrent layer are {hidden.dtype}; expected {list(self.made)}, that of the"
                " model's parameters: restore the model and apply the recipe again after a cast"
            )
        return self.made[hidden.dtype]

    def probe(self, width: int) -> None:
        """See what one token makes of an empty state; no hook of the model's is called, and no random number drawn."""
        module: Any = self.module()
        weight = next(p for p in module.parameters() if p.is_floating_point())
        if weight.dtype in self.made:
            return
        hidden = torch.zeros(1, 1, width, dtype=weight.dtype, device=weight.device)
        with torch.no_grad():
            layer = self._layer([])
            out = self._call(copied(module, None), hidden, None, layer)
            held = [(kind, i) for i in range(layer.number_of_states) for kind in ("conv_states", "recurrent_states")]
            self.slots = tuple((kind, i) for kind, i in held if getattr(layer, kind)[i] is not None)
            self.made[weight.dtype] = [out, *self._states(layer)]

    def run(self, hidden: Tensor, mask: Tensor | None, states: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
        """What the module makes of hidden states [B, n, H] and its states: its output [B, n, H], then new states."""
        module: Any = self.module()
        names = (name for name, _ in module.named_parameters())
        layer = self._layer(states)
        out = self._call(copied(module, dict(zip(names, weights, strict=True))), hidden, mask, layer)
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


class Through:
    """Stands at the entry of a layer in which no token meets another: its stream goes through as it is."""

    def made_of(self, hidden: Tensor) -> list[Tensor]:
        """What one token makes, empty: its hidden state."""
        return [hidden]

    def run(self, hidden: Tensor, mask: Tensor | None, states: Sequence[Tensor], weights: Sequence[Tensor]) -> Any:
        """A copy of the hidden states; an operator's output must not be its input."""
        return [hidden.clone()]


MIXERS[FEEDFORWARD] = Through()


def fill(layer: Any, kind: str, i: int, state: Tensor) -> None:
    """Put a state into transformers' cache layer."""
    getattr(layer, kind)[i] = state
    getattr(layer, f"is_{kind}_initialized")[i] = layer.has_previous_state[i] = True
    layer.dtype, layer.device = state.dtype, state.device
    if kind == "conv_states":
        layer.conv_kernel_size[i] = state.shape[-1]


def copied(module: nn.Module, weights: dict[str, Tensor] | None, prefix: str = "") -> nn.Module:
    """The module with other parameters; without any, with its own, in eval mode and without hooks."""
    made = type(module).__new__(type(module))
    vars(made).update(vars(module))
    if weights is None:
        vars(made).update({name: OrderedDict() for name in vars(module) if name.endswith("_hooks")}, training=False)
    else:
        own = {name: weights[prefix + name] if p is not None else None for name, p in module._parameters.items()}
        vars(made)["_parameters"] = own
    children = module._modules.items()
    vars(made)["_modules"] = {n: m and copied(m, weights, f"{prefix}{n}.") for n, m in children}
    return made


N = TypeVar("N", bound=Named)


def numbered(module: nn.Module, make: Callable[[int], N]) -> N:
    """What is known of a module; the same at each request, so that graphs which hold its number stay valid.

    Args:
        module: the module.
        make: makes it, given a number.
    """
    if module not in _NUMBERS:
        _NUMBERS[module] = number = next(_NEXT)
        MIXERS[number] = make(number)
        weakref.finalize(module, MIXERS.pop, number, None).atexit = False
    found: N = MIXERS[_NUMBERS[module]]
    return found
