"""Weights that come and go: a library's hooks bring each while its module runs, and take it away again.

Such hooks (accelerate's, of ``cpu_offload``, ``disk_offload`` and ``dispatch_model``) know where a weight is kept and
where it is wanted. What is captured is a twin of the model, without them and with hollow parameters in place of the
weights; as the graph runs, each weight is brought for the operation that takes it, and for no longer.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.node import map_aggregate

from vlmrewrite.compat import HOOKED_FORWARD, OFFLOAD_HOOK, offload_hooks
from vlmrewrite.hf.exchanged import is_ours
from vlmrewrite.hf.undo import Undo

_LENT = "vlmrewrite_lent"
_LAYOUT = ("shape", "dtype", "device", "ndim", "dim", "size", "numel", "stride", "requires_grad", "is_floating_point")


class Lent:
    """A weight in the place of which there is a hollow tensor; an operation that takes it is given the weight.

    Args:
        like: the hollow tensor.
        home: where weights are kept, by name.
        name: the weight's.
    """

    def __init__(self, like: Tensor, home: Any, name: str) -> None:
        self._like, self._home, self._name = like, home, name

    def brought(self) -> Tensor:
        """The weight, where it is wanted."""
        weight: Tensor = self._home[self._name]
        return weight.to(self._like.device, self._like.dtype)

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
    return OFFLOAD_HOOK in vars(model) and bool(offload_hooks(model))


class Place(NamedTuple):
    """Where a weight that comes and goes is kept.

    Attributes:
        path, name: of its module in the model, and its own in the module.
        home, key: a mapping that holds it, and under which name.
        device: where it is wanted.
    """

    path: str
    name: str
    home: Any
    key: str
    device: torch.device


def places(model: nn.Module) -> Iterator[Place]:
    """Each weight that comes and goes."""
    above: list[tuple[str, Any]] = []
    for path, module in model.named_modules():
        inside = f"{path}." if path else ""
        above = [(at, hook) for at, hook in above if inside.startswith(at)]
        above += [(inside, hook) for hook in offload_hooks(module) if hook.offload]
        for name, x in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            near = [(at, hook) for at, hook in above if at == inside or hook.place_submodules]
            if x.is_meta and near:
                at, hook = near[-1]
                wanted = hook.execution_device
                device = torch.device("cuda", wanted) if isinstance(wanted, int) else torch.device(wanted)
                yield Place(path, name, hook.weights_map, (inside + name).removeprefix(at), device)


def device_of(model: nn.Module) -> torch.device:
    """Where a model runs: where its first parameter is, or is wanted."""
    first = next(places(model), None) if lends(model) else None
    return next(model.parameters()).device if first is None else first.device


_TWINS: weakref.WeakKeyDictionary[Any, tuple[Any, nn.Module]] = weakref.WeakKeyDictionary()


def hollow(model: nn.Module, target: nn.Module, owner: object) -> nn.Module:
    """A twin without such hooks, whose parameters that come and go are hollow: of one number, and no number at that.

    It shares everything else with the model as it was when ``owner`` first asked.

    Args:
        model: where no weight of it comes and goes, there is no twin.
        target: the model, or its decoder.
        owner: keeps the twin.

    Returns:
        what is ``target`` in the twin.
    """
    if not lends(model):
        return target
    known = _TWINS.get(owner)
    if known is None or known[0] is not vars(model)[OFFLOAD_HOOK]:
        known = _TWINS[owner] = vars(model)[OFFLOAD_HOOK], _hollow(model)
    twin: Any = known[1]
    return twin if target is model else twin.get_decoder()  # type: ignore[no-any-return]


def _hollow(model: nn.Module) -> nn.Module:
    made: dict[tuple[str, str], Tensor] = {}
    for place in places(model):
        like = getattr(model.get_submodule(place.path), place.name)
        number = torch.full((), torch.nan if like.is_floating_point() else 0, dtype=like.dtype, device=place.device)
        tensor: Tensor = number.expand(like.shape)
        if isinstance(like, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        setattr(tensor, _LENT, Lent(tensor, place.home, place.key))
        made[place.path, place.name] = tensor
    return _twin(model, "", made, {})


def _twin(module: nn.Module, path: str, made: dict[tuple[str, str], Tensor], known: dict[int, nn.Module]) -> nn.Module:
    if id(module) in known:
        return known[id(module)]
    twin = known[id(module)] = type(module).__new__(type(module))
    own = dict(vars(module))
    if offload_hooks(module):
        forward = own.pop(HOOKED_FORWARD)
        own.pop(OFFLOAD_HOOK)
        own["forward"] = forward
    bound = own.get("forward")
    if isinstance(bound, types.MethodType) and bound.__func__ is type(module).forward:
        del own["forward"]
    if not path:
        own = {k: x for k, x in own.items() if not isinstance(x, (types.FunctionType, types.MethodType))}
    own = {k: types.MethodType(x.__func__, twin) if _is_of(x, module) else x for k, x in own.items()}
    for kind in ("_parameters", "_buffers"):
        own[kind] = {name: made.get((path, name), x) for name, x in own[kind].items()}
    below = f"{path}." if path else ""
    own["_modules"] = {
        name: x if x is None else _twin(x, f"{below}{name}", made, known) for name, x in own["_modules"].items()
    }
    vars(twin).update(own)
    return twin


def _is_of(x: object, module: nn.Module) -> bool:
    return isinstance(x, types.MethodType) and x.__self__ is module


def to_bring(inputs: Sequence[Any]) -> list[Any]:
    """A graph's inputs with what is lent in the place of what is hollow."""
    return [getattr(x, _LENT, x) for x in inputs]


def put_forward(undo: Undo, model: nn.Module, method: Any) -> None:
    """Let a model have a forward of its own; below such hooks, where they are and come to be."""
    name = HOOKED_FORWARD if lends(model) else "forward"
    vars(model)[name] = method
    undo.callback(_take_forward, model)


def _take_forward(model: nn.Module) -> None:
    own = vars(model)
    for name in {HOOKED_FORWARD, "forward"} & own.keys():
        if is_ours(own[name]):
            del own[name]
            if name == HOOKED_FORWARD:
                own[name] = types.MethodType(type(model).forward, model)
