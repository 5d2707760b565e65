"""Decoder layers that are alike are traced once: Dynamo sees a short model, whose trace hardly grows with depth.

Of the layers of one kind, the first and the last are traced; those between leave a stand-in behind, in whose place
:mod:`vlmrewrite.capture.expand` puts a copy of what the first one left. The model itself is not touched: Dynamo gets
modules that share everything with it but the list of layers.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import types
import weakref
from collections.abc import Collection, Iterator, Sequence
from itertools import starmap
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from vlmrewrite.capture.expand import UnlikeError, expand, stands_in, traced
from vlmrewrite.hf import APPLIED, decoder_layers, goes_by_number, indexed_mixers, is_bound, recurrent_mixers

_USUAL = (nn.Parameter, Tensor, type(None))
_PLAIN = (int, float, str, bool, type(None), set, frozenset, torch.dtype, torch.device)


class Alike:
    """Which layers of a model's decoder are alike, as of now.

    Attributes:
        layers: all of them.
        copies: for each that need not be traced, the one that it is a copy of.
        told: the same as text, for Dynamo to guard on.
        again: for the last one of each kind, which is traced too, the first.
        short: the model as Dynamo gets it; None where there are no copies.
    """

    def __init__(self, model: nn.Module, before: Alike | None = None) -> None:
        """Look at a model; ``before``: an earlier look, whose modules are used again if it found the same."""
        names = decoder_layers(model)
        self.layers = [model.get_submodule(name) for name in names]
        path = _path(model, names[0].rpartition(".")[0])
        strange = any("forward" in vars(m) and not is_bound(vars(m)["forward"], m) for _, m in path[1:])
        kinds = [] if strange else _kinds(model, self.layers)
        self.copies = {i: kind[0] for kind in kinds for i in kind[1:-1]}
        self.told = repr(self.copies)
        self.again = {kind[-1]: kind[0] for kind in kinds if len(kind) > 2}
        ends = [self.layers[i] for i in {*self.again, *self.again.values()}]
        copied = [m for i in self.copies for m in self.layers[i].modules()]
        seen = [m for layer in ends for m in layer.modules()] + copied
        self._seen = [(vars(m), {k: x.copy() if isinstance(x, dict) else x for k, x in vars(m).items()}) for m in seen]
        self._seen += [(m._modules, dict(m._modules)) for _, m in path]
        self._held = [x for m in copied for own in (m.parameters, m.buffers) for x in own(recurse=False)]
        self._layouts = list(map(_may_change, self._held))
        same = before is not None and before.copies == self.copies
        self._twins: dict[object, nn.Module] = before._twins if before is not None and same else {}
        self.short = self._shortened(path) if self.copies else None
        self._path = [(weakref.ref(m), self._twins.get(name if i else None)) for i, (name, m) in enumerate(path)]
        self._places: dict[int, tuple[object, list[tuple[dict[str, Any], str]]]] = {}
        self._lent: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}

    def still(self) -> bool:
        """Whether nothing has changed of what was compared."""
        try:
            same = all(starmap(operator.eq, self._seen))
        except (RuntimeError, ValueError):  # two tensors that are not the same object were compared
            return False
        return same and all(map(operator.eq, map(_may_change, self._held), self._layouts))

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """While ``short`` runs: what the modules above the layers hold is theirs, and what they are given they keep."""
        given = []
        for i, (ref, twin) in enumerate(self._path):
            module: Any = ref()
            own, known = _own(module, not i), self._lent.get(i)
            if known is None or not (_unchanged(own, known[0]) and _unchanged(vars(twin), known[1])):
                _become(twin, module, {k: x for k, x in own.items() if k != "_modules"}, {"_modules"})
                known = self._lent[i] = own, dict(vars(twin))
            given.append((module, twin, known[1]))
        yield
        for module, twin, before in given:
            for name, x in () if _unchanged(vars(twin), before) else dict(vars(twin)).items():
                if name != "_modules" and before.get(name) is not x and not isinstance(x, types.MethodType):
                    vars(module)[name] = x

    def complete(self, gm: GraphModule, inputs: Sequence[object]) -> list[tuple[int, str]] | str:
        """Give a graph that was captured of ``short`` the layers that were not traced.

        Args:
            gm: changed in place.
            inputs: its own, flat.

        Returns:
            what it takes behind its inputs, for :meth:`tensors`; or why the graph is of no use, as
            :func:`vlmrewrite.capture.expand.expand` raises it.
        """
        placed = list(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))
        names = {i: self._names(i) for i in {*self.again, *self.again.values()}}
        own = {i: {n: known[id(x)] for n, x in placed if id(x) in known} for i, known in names.items()}
        try:
            taken = expand(gm.graph, own, self.again)
        except UnlikeError as e:
            return str(e)
        gm.recompile()
        return taken

    def _names(self, layer: int) -> dict[int, str]:
        """The names of a layer's parameters and buffers, by the tensors' ids."""
        module = self.layers[layer]
        found = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        return {id(x): name for name, x in found}

    def tensors(self, wanted: Sequence[tuple[int, str]]) -> list[Tensor]:
        """Parameters and buffers of layers, as of now."""
        key = id(wanted)
        if key not in self._places:
            paths = [(layer, *name.rpartition(".")[::2]) for layer, name in wanted]
            homes = [(self.layers[layer].get_submodule(path), name) for layer, path, name in paths]
            kinds = ["_parameters" if n in dict(m.named_parameters(recurse=False)) else "_buffers" for m, n in homes]
            self._places[key] = wanted, [(vars(m)[kind], n) for (m, n), kind in zip(homes, kinds, strict=True)]
        return [home[name] for home, name in self._places[key][1]]

    def _shortened(self, path: list[tuple[str, nn.Module]]) -> nn.Module:
        layers = dict(path[-1][1]._modules)
        for i, name in enumerate(layers):
            if i in self.copies:
                layers[name] = self._twin(i, self.layers[i], forward=stands_in(i, self.copies[i]))
            elif i in self.again or i in self.again.values():
                layers[name] = self._twin(i, self.layers[i], forward=traced(i))
        below: dict[str, nn.Module | None] = layers
        for depth, (name, module) in reversed(list(enumerate(path))):
            made = self._twin(name if depth else None, module, _modules=below)
            if depth:
                below = path[depth - 1][1]._modules | {name: made}
        return made

    def _twin(self, key: object, module: nn.Module, **other: Any) -> nn.Module:
        """A module that shares everything with another one, but for some attributes."""
        twin = self._twins.setdefault(key, type(module).__new__(type(module)))
        made = {k: types.MethodType(x, twin) if k == "forward" else x for k, x in other.items()}
        _become(twin, module, _own(module, key is None) | made)
        return twin


def _become(twin: Any, module: nn.Module, own: dict[str, Any], but: Collection[str] = ()) -> None:
    """Let a twin hold what its module does, with methods of its own; another thread may be running it."""
    for name in vars(twin).keys() - own.keys() - {*but}:
        vars(twin).pop(name, None)
    new = {}
    for name, x in own.items():
        known = vars(twin).get(name)
        if not is_bound(x, module):
            new[name] = x
        elif not is_bound(known, twin) or known.__func__ is not x.__func__:
            new[name] = types.MethodType(x.__func__, twin)
    vars(twin).update(new)


def _unchanged(now: dict[str, Any], then: dict[str, Any]) -> bool:
    """Whether two dicts hold the very same things."""
    return now.keys() == then.keys() and all(map(operator.is_, now.values(), then.values()))


def _path(model: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    """The modules from the model to the one of this name."""
    found = [("", model)]
    for part in name.split("."):
        found.append((part, found[-1][1].get_submodule(part)))
    return found


def _own(module: nn.Module, root: bool) -> dict[str, Any]:
    """What a module holds; of the whole model without functions, which its class has too, and which may hold it."""
    kinds = (types.FunctionType, types.MethodType) if root else ()
    return {k: x for k, x in vars(module).items() if k != APPLIED and not isinstance(x, kinds)}


_may_change = attrgetter("dtype", "requires_grad", "device")


def _layout(x: Tensor | None) -> tuple[object, ...]:
    return () if x is None else (type(x), x.dtype, x.requires_grad, x.device, x.shape)


def _kinds(model: nn.Module, layers: list[nn.Module]) -> list[list[int]]:
    """The layers by kind; those whose mixers operators name by a number are each of their own."""
    kinds, states = list[list[int]](), recurrent_mixers(model).keys() | indexed_mixers(model).keys()
    tied = list(map(_tied, layers))
    for i, layer in enumerate(layers):
        kind = next((k for k in kinds if _alike(layers[k[0]], layer, k[0], i) and tied[k[0]] == tied[i]), None)
        if kind is None or i in states:
            kinds.append([i])
        else:
            kind.append(i)
    return kinds


def _tied(layer: nn.Module) -> list[int]:
    """For each tensor of a layer, which is the first that is the very same."""
    ids = [id(x) for own in (layer.named_parameters, layer.named_buffers) for _, x in own(remove_duplicate=False)]
    return list(map(ids.index, ids))


def _alike(a: nn.Module, b: nn.Module, i: int, k: int) -> bool:
    """Whether two modules, of layers ``i`` and ``k``, differ in nothing but the numbers in their tensors."""
    x, y = vars(a), vars(b)
    if type(a) is not type(b) or x.keys() != y.keys():
        return False
    for name, p in x.items():
        q = y[name]
        if name in ("_parameters", "_buffers"):
            if p.keys() != q.keys() or any(_layout(p[n]) != _layout(q[n]) or type(p[n]) not in _USUAL for n in p):
                return False
        elif name == "_modules":
            if p.keys() != q.keys() or not all(_alike(p[n], q[n], i, k) for n in p if p[n] is not q[n]):
                return False
        elif name.endswith("_hooks"):
            if p or q:
                return False
        elif not _same(p, q) and (type(p) is not int or (p, q) != (i, k) or goes_by_number(type(a), name)):  # type: ignore[arg-type]
            return False
    return True


def _same(p: Any, q: Any) -> bool:
    """Whether two attributes are the same thing, or plain data that is equal."""
    if p is q:
        return not isinstance(p, Tensor)
    if type(p) is not type(q):
        return False
    if isinstance(p, (tuple, list)):
        return len(p) == len(q) and all(map(_same, p, q))
    if isinstance(p, dict):
        return p.keys() == q.keys() and all(_same(p[n], q[n]) for n in p)
    if isinstance(p, functools.partial):
        return _same((p.func, p.args, p.keywords), (q.func, q.args, q.keywords))
    return isinstance(p, _PLAIN) and bool(p == q)
