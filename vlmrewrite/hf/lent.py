"""Weights that are elsewhere: a library's hooks bring each while its module runs, or tokens to the weight's device.

Such hooks (accelerate's, of ``cpu_offload``, ``disk_offload`` and ``dispatch_model``) know where a weight is kept and
where it is wanted. What is captured is a twin of the model, without them and with hollow parameters in place of these
weights, all on the device that the model's inputs come to. As the graph runs, a weight that comes and goes is brought
for the operation that takes it, and for no longer; one on another device stays there, and what meets it comes to it.
"""

from __future__ import annotations

import contextlib
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate

from vlmrewrite.compat import HOOKED_FORWARD, OFFLOAD_HOOK, offload_hooks, tree_flatten, tree_unflatten
from vlmrewrite.hf.exchanged import forward_name, is_bound, is_ours
from vlmrewrite.hf.undo import Undo

APPLIED = "vlmrewrite_undo"
"""Attribute of a model that a recipe is applied to: what takes it off again; None in a copy of such a model."""

_LENT = "vlmrewrite_lent"
_TENSORS = ("_parameters", "_buffers")
_LAYOUT = ("shape", "dtype", "device", "ndim", "dim", "size", "numel", "stride", "requires_grad", "is_floating_point")


class Lent:
    """A weight in the place of which there is a hollow tensor; an operation that takes it is given the weight.

    Args:
        like: the hollow tensor.
        place: where the weight is kept, and wanted.
    """

    def __init__(self, like: Tensor, place: Place) -> None:
        self._like, self.place = like, place

    def brought(self) -> Tensor:
        """The weight, where it is wanted."""
        weight: Tensor = self.place.home[self.place.key]
        return weight.to(self.place.device, self._like.dtype)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._like if name in _LAYOUT else self.brought(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given: Any = map_aggregate((args, kwargs or {}), lambda x: x.brought() if isinstance(x, Lent) else x)
        return function(*given[0], **given[1])


def lends(model: nn.Module) -> bool:
    """Whether hooks on a model say where its weights are wanted."""
    return bool(offload_hooks(model))


def elsewhere(model: nn.Module) -> bool:
    """Whether weights of a model come and go by its hooks, or are on several devices."""
    return lends(model) and next(places(model), None) is not None


class Place(NamedTuple):
    """Where a weight is kept that comes and goes, or is on another device than the model's inputs.

    Attributes:
        path, name: of its module in the model, and its own in the module.
        home, key: a mapping that holds it, and under which name.
        device: where it is wanted.
        stays: whether it is there, too.
    """

    path: str
    name: str
    home: Any
    key: str
    device: torch.device
    stays: bool


def places(model: nn.Module) -> Iterator[Place]:
    """Each weight that comes and goes, or is on another device than :func:`device_of`."""
    main = device_of(model)
    above: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        inside = f"{path}." if path else ""
        above = [(at, hook) for at, hook in above if inside.startswith(at)]
        above += [(inside, hook) for hook in offload_hooks(module) if hook.offload]
        near = [(at, hook) for at, hook in above if at == inside or hook.place_submodules]
        for table in (vars(module)[kind] for kind in _TENSORS):
            for name, x in table.items():
                if x is not None and not x.is_meta and x.device != main:
                    yield Place(path, name, table, name, x.device, stays=True)
                elif x is not None and x.is_meta and near:
                    at, hook = near[-1]
                    key, device = (inside + name).removeprefix(at), _device(hook.execution_device)
                    yield Place(path, name, hook.weights_map, key, device, stays=False)


def _device(wanted: Any) -> torch.device:
    device = torch.device("cuda", wanted) if isinstance(wanted, int) else torch.device(wanted)
    return device if ":" in str(device) or device.type == "cpu" else torch.empty(0, device=device).device


def device_of(model: nn.Module) -> torch.device:
    """Where a model's inputs come to: as its hooks say, else where its first parameter is."""
    hooks = (hook for module in model.modules() for hook in offload_hooks(module)) if lends(model) else ()
    wanted = next((hook.execution_device for hook in hooks if hook.execution_device is not None), None)
    return _first_parameter(model).device if wanted is None else _device(wanted)


def _first_parameter(model: nn.Module) -> Tensor:
    """As ``next(model.parameters())``, in a fifth of the time.

    Raises:
        StopIteration: there is none.
    """
    left = [model]
    while left:
        inside = vars(left.pop())
        for x in inside["_parameters"].values():
            if x is not None:
                return x  # type: ignore[no-any-return]
        left += [module for module in reversed(inside["_modules"].values()) if module is not None]
    raise StopIteration


class Twin:
    """A model without such hooks, whose weights that are elsewhere are hollow: of one number, and no number at that.

    It is the same object, with the same hollow parameters, as long as these are of one form, and shares everything else
    with the model as it is when asked for.
    """

    def __init__(self) -> None:
        self._modules: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
        self._hollow: dict[tuple[str, str], Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Twin:
        """A copy of a model has a twin of its own, made when it is asked for."""
        return Twin()

    def of(self, model: nn.Module) -> nn.Module:
        """What stands for a model."""
        main = device_of(model)
        found = {(x.path, x.name): self._hollow_of(model, x, main) for x in places(model)}
        self._hollow = found
        return self._module(model, "", set())

    def _hollow_of(self, model: nn.Module, place: Place, main: torch.device) -> Tensor:
        like = getattr(model.get_submodule(place.path), place.name)
        known = self._hollow.get((place.path, place.name))
        trained = place.stays and like.requires_grad
        form = like.shape, like.dtype, main, isinstance(like, nn.Parameter), trained
        if known is None or _form(known) != form:
            number = torch.full((), torch.nan if like.is_floating_point() else 0, dtype=like.dtype, device=main)
            known = number.expand(like.shape)
            if isinstance(like, nn.Parameter):
                known = nn.Parameter(known, requires_grad=trained)
        setattr(known, _LENT, Lent(known, place))
        return known

    def _module(self, module: nn.Module, path: str, done: set[int]) -> nn.Module:
        twin = self._modules.get(module)
        if twin is None:
            twin = self._modules[module] = type(module).__new__(type(module))
        if id(module) in done:
            return twin
        done.add(id(module))
        own = dict(vars(module))
        if offload_hooks(module):
            own["forward"] = own.pop(HOOKED_FORWARD)
            del own[OFFLOAD_HOOK]
        if is_bound(own.get("forward"), module) and own["forward"].__func__ is type(module).forward:
            del own["forward"]
        if not path:
            own = {k: x for k, x in own.items() if not isinstance(x, (types.FunctionType, types.MethodType))}
            own.pop(APPLIED, None)
        own = {k: types.MethodType(x.__func__, twin) if is_bound(x, module) else x for k, x in own.items()}
        below = f"{path}." if path else ""
        tables = {kind: {n: self._hollow.get((path, n), x) for n, x in own[kind].items()} for kind in _TENSORS}
        tables["_modules"] = {
            name: x if x is None else self._module(x, f"{below}{name}", done) for name, x in own["_modules"].items()
        }
        for kind, table in tables.items():  # the same dicts, which others look at for what has changed
            own[kind] = held = vars(twin).get(kind, {})
            for name in held.keys() - table.keys():
                del held[name]
            held.update(table)
        for name in vars(twin).keys() - own.keys():
            vars(twin).pop(name, None)
        vars(twin).update(own)
        return twin


def _form(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.dtype, x.device, isinstance(x, nn.Parameter), x.requires_grad


def hollow(model: nn.Module, target: nn.Module, owner: object) -> nn.Module:
    """What Dynamo is to see in the place of a model.

    Args:
        model: where nothing says where its weights are wanted, there is no twin.
        target: the model, or its decoder.
        owner: keeps the :class:`Twin`.

    Returns:
        what is ``target`` in the twin.
    """
    if not lends(model):
        return target
    twin: Any = vars(owner).setdefault(_LENT, Twin()).of(model)
    return twin if target is model else twin.get_decoder()  # type: ignore[no-any-return]


@contextlib.contextmanager
def weights_brought(module: nn.Module) -> Iterator[None]:
    """While a module does something else than its forward: weights of its own are there, as its hooks bring them."""
    hooks = [hook for hook in offload_hooks(module) if hook.offload]
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, None)


def to_bring(inputs: Sequence[Any]) -> list[Any]:
    """A graph's inputs with the weight, or what is lent, in the place of what is hollow."""
    each = (getattr(x, _LENT, x) for x in inputs)
    return [x.brought() if isinstance(x, Lent) and x.place.stays else x for x in each]


class Site(NamedTuple):
    """Where one of a graph's inputs is, and whether it is a weight, which operations come to."""

    device: torch.device
    weight: bool


def sites(inputs: Sequence[Any]) -> tuple[Site | None, ...]:
    """Where each of a graph's inputs is, or is wanted; None for what is no tensor."""

    def site(x: Any) -> Site | None:
        lent = getattr(x, _LENT, None)
        if lent is not None:
            return Site(lent.place.device, weight=True)
        return Site(x.device, isinstance(x, nn.Parameter)) if isinstance(x, Tensor) else None

    return tuple(map(site, inputs))


def copied(x: Any, device: torch.device) -> Any:
    """What holds tensors, or is one, with these on another device."""
    leaves, spec = tree_flatten(x)
    return tree_unflatten([leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def put_forward(undo: Undo, module: nn.Module, method: Any) -> None:
    """Let a module have another forward, below such hooks, where they are and come to be."""
    vars(module)[forward_name(module)] = method
    undo.callback(_take_forward, module)


def _take_forward(module: nn.Module) -> None:
    """Take it off, unless somebody has put another in its place meanwhile."""
    own = vars(module)
    if is_ours(own.get(HOOKED_FORWARD)):
        own[HOOKED_FORWARD] = types.MethodType(type(module).forward, module)
    if is_ours(own.get("forward")):
        del own["forward"]
