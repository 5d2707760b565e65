"""Private interfaces of operators, and of tensors without memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

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


def operator_of(target: Any) -> Any:
    """An operator of the dispatcher, of a packet that has one; None for anything else that can be called."""
    if isinstance(target, attribute(torch, "_ops.OpOverloadPacket", "torch")):
        target = getattr(target, target.overloads()[0])
    return target if schema_of(target) is not None else None


def autograd_function() -> Any:
    """Dynamo's operator in the place of an autograd function: it takes its forward and backward, and the arguments."""
    return find("torch._functorch.autograd_function", "autograd_function_apply")


def gradient_mark() -> Any:
    """What switches the recording of gradients on or off, in a captured graph: takes a bool."""
    return find("torch._C", "_set_grad_enabled")


def autocast_marks() -> tuple[Any, Any]:
    """What begins and ends a part under ``torch.autocast`` in a captured graph: the second takes the first's result."""
    return find("torch.amp", "_enter_autocast"), find("torch.amp", "_exit_autocast")


def assert_tensor(condition: Tensor, message: str) -> None:
    """Check a bool tensor of one number as it is computed, also in a graph that is being exported.

    Raises:
        RuntimeError: it is false, and this runs eagerly on a CPU.
    """
    attribute(torch, "_assert_async", "torch")(condition, message)


def has_gradient(operator: Any) -> bool:
    """Whether an operator of the dispatcher is known to autograd; if not, what flows back through it ends there."""
    known = attribute(torch, "_C._dispatch_has_kernel_for_dispatch_key", "torch")
    name = operator.name()
    return any(known(name, key) for key in ("Autograd", "AutogradCPU", "AutogradCUDA", "CompositeImplicitAutograd"))


def taking(target: object, who: str, given: Sequence[str], needs: Collection[str]) -> Any:
    """What can be called, as graphs hold it: ``torch.ops.vlm.name`` is its ``.default``, anything else is itself.

    Args:
        target: an operator of the dispatcher, whose schema says what it takes, or anything else, which is not checked.
        who: calls it.
        given: what each argument is, in order.
        needs: those of ``given`` that must not be given as another argument where the schema has one of their name.

    Raises:
        ValueError: the operator cannot take what it is given.
    """
    packet = attribute(torch, "_ops.OpOverloadPacket", "torch")
    found = attribute(target, "default", "torch") if isinstance(target, packet) else target
    if (schema := schema_of(found)) is None:
        return found
    names, calls = [a.name for a in schema.arguments], f"{who} gives its operator ({', '.join(given)})"
    least = sum(not a.has_default_value() for a in schema.arguments)
    if not least <= len(given) <= len(names):
        expected = len(names) if least == len(names) else f"{least} to {len(names)}"
        raise ValueError(
            f"{calls}, {len(given)} arguments; expected {expected}, as {schema} takes them: needs, what is always"
            " given, weights, options"
        )
    for need, name in zip(given, names, strict=False):
        if need in needs and need in names and given[names.index(need)] != need:
            raise ValueError(f"{calls}, {need!r} as the argument {name!r}; expected `needs` in the order of {schema}")
    return found


def assert_scalar() -> Any:
    """The operator by which a graph checks a number that it has computed."""
    return attribute(torch.ops, "aten._assert_scalar.default", "torch")


def fake_mode() -> Any:
    """A context in which tensors have no memory; real ones may take part, sizes that depend on numbers are symbols."""
    shapes = find("torch.fx.experimental.symbolic_shapes", "ShapeEnv")()
    return find("torch._subclasses.fake_tensor", "FakeTensorMode")(allow_non_fake_inputs=True, shape_env=shapes)


def at_most(n: Any) -> int:
    """A number, or the largest that a symbolic one can be, as the size of ``x[mask]`` is the mask's at most."""
    return n if isinstance(n, int) else int(n.node.shape_env.bound_sympy(n.node.expr).upper)


def dispatch_mode() -> Any:
    """The class of contexts that are told of every operator that runs in them."""
    return find("torch.utils._python_dispatch", "TorchDispatchMode")
