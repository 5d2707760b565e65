"""Private interfaces of operators, and of tensors without memory."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from vlmrewrite.compat.private import attribute, find


def nn_functions() -> ModuleType:
    """The module of the functions that :mod:`torch.nn.functional` takes from C++."""
    module: ModuleType = find("torch._C", "_nn")
    return module


def schema_of(target: object) -> Any:
    """What an operator of the dispatcher writes and returns; None for anything else that can be called.

    ``is_mutable`` says that it writes to its arguments, ``alias_info`` of one of its ``returns`` that it shares memory.
    """
    return (
        attribute(target, "_schema", "torch")
        if isinstance(target, attribute(torch, "_ops.OpOverload", "torch"))
        else None
    )


def assert_scalar() -> Any:
    """The operator by which a graph checks a number that it has computed."""
    return attribute(torch.ops, "aten._assert_scalar.default", "torch")


def fake_mode() -> Any:
    """A context in which tensors have no memory; real ones may take part."""
    return find("torch._subclasses.fake_tensor", "FakeTensorMode")(allow_non_fake_inputs=True)


def unknowable() -> tuple[type[Exception], ...]:
    """What a fake tensor raises where the result, or its shape, depends on numbers."""
    names = ("DynamicOutputShapeException", "DataDependentOutputException")
    return tuple(find("torch._subclasses.fake_tensor", name) for name in names)


def dispatch_mode() -> Any:
    """The class of contexts that are told of every operator that runs in them."""
    return find("torch.utils._python_dispatch", "TorchDispatchMode")
