"""Whose forwards and hooks a model runs: its classes', a recipe's, or somebody else's."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from vlmrewrite.compat import HOOKED_FORWARD, hooks_of, offload_hooks

_HERE = Path(__file__).parents[1]


_PARAMETERS: WeakKeyDictionary[Callable[..., Any], Mapping[str, inspect.Parameter]] = WeakKeyDictionary()


def parameters_of(method: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a bound method, or a function, takes; looked up once for each function."""
    function = getattr(method, "__func__", method)
    if not isinstance(function, types.FunctionType):
        return inspect.signature(method).parameters
    if function not in _PARAMETERS:
        _PARAMETERS[function] = inspect.signature(function).parameters
    found = _PARAMETERS[function]
    first = next(iter(found.values()), None)
    own = method is function or first is None or first.kind is first.VAR_POSITIONAL
    return found if own else dict(list(found.items())[1:])


def exchanged(module: nn.Module) -> bool:
    """Whether a module's forward was exchanged on the instance, by somebody else than a recipe or accelerate."""
    return not has_own_forward(module) and not is_ours(vars(module)[forward_name(module)])


def forward_name(module: nn.Module) -> str:
    """The attribute that holds a forward of the instance: below accelerate's hooks, where there are any."""
    return HOOKED_FORWARD if offload_hooks(module) else "forward"


def has_own_forward(module: nn.Module) -> bool:
    """Whether a module's forward is its class's, below such hooks or without."""
    forward = vars(module).get(forward_name(module))
    return forward is None or getattr(forward, "__func__", None) is type(module).forward


def is_bound(x: object, module: nn.Module) -> bool:
    """Whether something is a method of this very module."""
    return isinstance(x, types.MethodType) and x.__self__ is module


def is_ours(method: object) -> bool:
    """Whether a function or a method was written here."""
    code = getattr(getattr(method, "__func__", method), "__code__", None)
    return code is not None and Path(code.co_filename).is_relative_to(_HERE)


def hooked(model: nn.Module) -> str:
    """What may have kept a forward from being captured: another one in its place, or hooks, captured with it."""
    if (name := next((name for name, module in model.named_modules() if exchanged(module)), None)) is not None:
        who = name or "the model"
        return f"; the forward of {who} was exchanged on the instance: expected its own, or one that Dynamo can trace"
    found = []
    for name, module in model.named_modules():
        hooks = hooks_of(module)
        if any(not str(getattr(hook, "__module__", "")).startswith(("transformers.", "vlmrewrite.")) for hook in hooks):
            found.append(name or "the model")
    if not found:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f" (there are hooks on {', '.join(found[:3])}{more}: expected hooks that Dynamo can trace, or none)"
