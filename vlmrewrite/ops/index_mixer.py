"""Modules that attend to the keys that their index selects, called as functions: of tokens and what is held of all."""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import Cache, DynamicLayer

from vlmrewrite.compat import set_attention_implementation
from vlmrewrite.ops.mixers import Named, copied

Parts = Mapping[str, Tensor | tuple[Tensor, ...]]
"""What a module's forward is given of each token, by the argument's name: [B, n, C] each."""


class _MadeError(Exception):
    """The module has made all that is held of its tokens."""


class _Held(DynamicLayer):
    """Stands for the module's cache layer: notes what it is given, or returns what there is.

    Args:
        index: the name of the method that takes what the index holds of some tokens, and returns all of it.
        there: keys, values and index, of all tokens; None: stop as soon as they are made.
        at: where in these belongs what is given, int64 [B, n]; None: it is there already.
    """

    def __init__(self, index: str, there: Sequence[Tensor] | None, at: Tensor | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.there, self.at, self.made = there, at, dict[str, tuple[Tensor, ...]]()
        note = functools.partial(_Held._note, weakref.proxy(self), "index")  # no cycle, which would keep all tensors
        setattr(self, index, note)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._note("keys", key_states, value_states)  # type: ignore[no-any-return]

    def _note(self, what: str, *given: Tensor) -> Any:
        self.made[what] = given
        if self.there is not None:
            own = self.there[:2] if what == "keys" else self.there[2:]
            if self.at is not None:
                for x, new in zip(own, given, strict=True):
                    at = self.at.to(x.device).view(len(x), *[1] * (x.dim() - 3), -1, 1)
                    x.scatter_(-2, at.expand_as(new), new.to(x.dtype))
            return tuple(own) if what == "keys" else own[0]
        if len(self.made) == 2:
            raise _MadeError
        return given if what == "keys" else given[0]


class IndexedMixer(Named):
    """A module that attends to the keys that its index selects.

    Args:
        module: it.
        number: under which operators name it.
        index: see :class:`_Held`.
    """

    def __init__(self, module: nn.Module, number: int, index: str) -> None:
        super().__init__(module, number)
        self._index, self._config = index, copy.copy(module.config)
        set_attention_implementation(self._config, "sdpa")  # with which the module makes its masks
        self._heads: tuple[int, int] | None = None
        self._tail: tuple[int, ...] = ()
        self._dtypes = torch.float32, torch.float32
        self._tried, self._flops = False, dict[str, tuple[int, int, int]]()

    def keys(self, parts: Parts, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What is held of some tokens: keys and index in one, [B, 1, n, W], and values [B, Hk, n, Dv]."""
        held = _Held(self._index, None)
        hidden: Any = parts["hidden_states"]
        n = hidden.shape[1]
        try:
            at = torch.arange(n, device=hidden.device)
            self._run(parts, held, (at <= at[:, None])[None, None], at[None], weights)
        except _MadeError:
            pass
        return self._packed(held)

    def _packed(self, held: _Held) -> tuple[Tensor, Tensor]:
        if len(held.made) < 2:
            raise NotImplementedError(f"{self._name()} has an index, and made no keys, or nothing for that index")
        (k, v), (index,) = held.made["keys"], held.made["index"]
        if index.dim() not in (3, 4) or not index.is_floating_point():
            raise NotImplementedError(
                f"the index of {self._name()} holds {index.dtype} {list(index.shape)} of some tokens; expected"
                " [B, n, C] or [B, H, n, C], floating point"
            )
        self._heads, self._dtypes = (k.shape[1], k.shape[3]), (k.dtype, index.dtype)
        self._tail = tuple(index.shape[1:2]) if index.dim() == 4 else ()
        index = index.transpose(1, 2).flatten(2) if index.dim() == 4 else index
        return torch.cat([k.transpose(1, 2).flatten(2), index], -1).unsqueeze(1), v.contiguous()

    def attend(
        self, parts: Parts, k: Tensor, v: Tensor, seen: Tensor, places: Tensor, weights: Sequence[Tensor]
    ) -> Tensor:
        """What the module makes of some tokens: [B, n, H].

        Args:
            parts: of these tokens.
            k, v: what is held, as :meth:`keys` makes it.
            seen: which key each of them may see, bool [B, n, m].
            places: their own places among the keys, int64 [B, n].
            weights: the module's parameters, in order.
        """
        return self._taken(self._run(parts, self._holding(parts, k, v, weights), seen[:, None], places, weights))

    def step(self, parts: Parts, k: Tensor, v: Tensor, seen: Tensor, places: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`attend` and :meth:`keys` in one, with the module's own parameters.

        Args:
            parts, seen, places: as for :meth:`attend`.
            k, v: what is held, and room for these tokens, at their places; it may be filled.
        """
        held = self._holding(parts, k, v, None, places)
        out = self._taken(self._run(parts, held, seen[:, None], places, None))
        return out, *self._packed(held)

    def _holding(self, parts: Parts, k: Tensor, v: Tensor, weights: Any, at: Tensor | None = None) -> _Held:
        if self._heads is None:
            self.keys(parts, weights)
        assert self._heads is not None
        both = k[:, 0].split([wide := self._heads[0] * self._heads[1], k.shape[-1] - wide], -1)
        keys, index = (x.to(dtype) for x, dtype in zip(both, self._dtypes, strict=True))
        if self._tail:
            index = index.unflatten(2, (*self._tail, -1)).transpose(1, 2)
        return _Held(self._index, (keys.unflatten(2, self._heads).transpose(1, 2), v, index), at)

    def _taken(self, out: Any) -> Tensor:
        out, *rest = out if isinstance(out, tuple) else (out,)
        if any(x is not None for x in rest):
            raise NotImplementedError(
                f"{self._name()} gives other layers more than its output, which is not known here"
            )
        return out  # type: ignore[no-any-return]

    def flops(self, given: str, widths: list[int], weights: Sequence[Tensor]) -> tuple[int, int, int]:
        """FLOPs of what is made of a key, of :meth:`attend` for a token, and for each key that the token meets."""
        if given not in self._flops:
            empty = [torch.empty(w.shape, dtype=w.dtype, device="meta") for w in weights]
            q = torch.empty(1, 1, 1, sum(widths), dtype=empty[0].dtype, device="meta")
            parts, places = parts_of(q, given, widths), torch.zeros(1, 1, dtype=torch.int64, device="meta")
            with FlopCounterMode(display=False) as counter:
                held = [x.repeat(1, 1, 2, 1) for x in self.keys(parts, empty)]
            found = [counter.get_total_flops()]
            for n, m in ((1, 1), (1, 2), (2, 2)):
                seen = torch.ones(1, n, m, dtype=torch.bool, device="meta")
                some = {name: of_each(x, operator.methodcaller("repeat", 1, n, 1)) for name, x in parts.items()}
                with FlopCounterMode(display=False) as counter:
                    self.attend(some, held[0][:, :, :m], held[1][:, :, :m], seen, places.repeat(1, n), empty)
                found.append(counter.get_total_flops())
            made, one, more, four = found
            token = one - (more - one)
            meeting = (four - more - token) // 2
            self._flops[given] = made + more - one - meeting, token, meeting
        return self._flops[given]

    def try_apart(self, parts: Parts, k: Tensor, v: Tensor, seen: Tensor, places: Tensor, out: Tensor, w: Any) -> None:
        """See once that its last token alone comes to the same.

        Raises:
            NotImplementedError: it does not: the module takes more from the other tokens than what is held of them.
        """
        if self._tried or seen.shape[1] < 2:
            return
        self._tried = True
        last = {name: of_each(x, lambda y: y[:, -1:]) for name, x in parts.items()}
        with torch.no_grad():
            try:
                alone = self.attend(last, k, v, seen[:, -1:], places[:, -1:], w)
                same = torch.allclose(alone, out[:, -1:], rtol=0.05, atol=0.05 * float(out.abs().max()) + 1e-6)
            except (RuntimeError, IndexError):
                same = False
        if not same:
            raise NotImplementedError(
                f"{self._name()} takes more from other tokens than the keys, values and index that are held of them"
            )

    def _run(self, parts: Parts, held: _Held, seen: Tensor, places: Tensor, weights: Sequence[Tensor] | None) -> Any:
        module: Any = self.module()
        hidden: Any = parts["hidden_states"]
        made: Any = module
        if weights is not None:
            names = (name for name, _ in module.named_parameters())
            made = copied(module, dict(zip(names, weights, strict=True)))
        made = _configured(made, self._config)
        given = {self.cache: Cache(layers=[held] * (module.layer_idx + 1)), "attention_mask": seen.to(hidden.device)}
        if _takes_places(type(module).forward):
            given["position_ids"] = places.to(hidden.device)
        return type(module).forward(made, **parts, **given)

    def _name(self) -> str:
        return type(self.module()).__name__


def _configured(module: nn.Module, config: Any) -> nn.Module:
    """The module with another config, in itself and all in it; parts without any are the module's own."""
    own = {name: m and _configured(m, config) for name, m in module._modules.items()}
    if "config" not in vars(module) and all(m is module._modules[name] for name, m in own.items()):
        return module
    made = type(module).__new__(type(module))
    vars(made).update(vars(module), _modules=own)
    if "config" in vars(module):
        vars(made)["config"] = config
    return made


@functools.cache
def _takes_places(forward: Callable[..., Any]) -> bool:
    taken = inspect.signature(forward).parameters
    return "position_ids" in taken or any(p.kind is p.VAR_KEYWORD for p in taken.values())


def of_each(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A tensor, or each of a tuple's, changed."""
    return tuple(map(change, x)) if isinstance(x, tuple) else change(x)


def packed(parts: Parts) -> tuple[Tensor, str, list[int]]:
    """All that is given of each token in one tensor [B, 1, n, W], and how to take that apart."""
    several = [x if isinstance(x, tuple) else (x,) for x in parts.values()]
    given = ",".join(
        [
            f"{name}:{len(x) if isinstance(x, tuple) else 0}:{_NAMES[each[0].dtype]}"
            for (name, x), each in zip(parts.items(), several, strict=True)
        ]
    )
    tensors = [x for each in several for x in each]
    batch = tensors[0].shape[0]
    q = torch.cat([x.expand(batch, -1, -1) for x in tensors], -1)
    return q.unsqueeze(1), given, [x.shape[-1] for x in tensors]


def parts_of(q: Tensor, given: str, widths: list[int]) -> Parts:
    """What :func:`packed` was given."""
    tensors, parts = iter(q[:, 0].split(widths, -1)), dict[str, Any]()
    for name, count, dtype in (each.split(":") for each in given.split(",")):
        own = [next(tensors).to(getattr(torch, dtype)) for _ in range(int(count) or 1)]
        parts[name] = tuple(own) if int(count) else own[0]
    return parts


_NAMES = {getattr(torch, name): name for name in ("float64", "float32", "float16", "bfloat16")}


def dtype_of(given: str) -> torch.dtype:
    """The dtype of the hidden states, which come first."""
    dtype: torch.dtype = getattr(torch, given.split(",")[0].split(":")[2])
    return dtype


def dropout_of(module: nn.Module) -> float:
    """The largest dropout of a module and those in it."""
    found = [x for m in module.modules() for name, x in vars(m).items() if "dropout" in name and isinstance(x, float)]
    return max([0.0, *found, *(m.p for m in module.modules() if isinstance(m, nn.Dropout))])
