"""Operators: each is defined once by its PyTorch reference; some have a Triton kernel besides.

``vlm::name`` is the operator that passes and rewritten graphs speak of; it always computes its reference. Where a
kernel was given, ``vlm_triton::name`` has the same schema and runs the kernel on the devices that can; which of the two
a node becomes is decided once, in lowering.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from vlmrewrite.errors import shown
from vlmrewrite.ops.device import kernels_missing, launcher
from vlmrewrite.ops.recomputing import given_back, recomputed, remember

REFERENCES: dict[object, Callable[..., Any]] = {}
"""Operator -> the Python function that defines it."""

OPAQUE: set[object] = set()
"""The operators that tracing does not see through."""

SCRATCH: dict[object, Callable[..., int]] = {}
"""Operator -> the bytes that its reference holds inside, beyond its arguments and results, given its arguments."""

KERNELS: dict[object, Any] = {}
"""Operator -> the operator of the same schema that runs a Triton kernel."""

_library = torch.library.Library("vlm", "DEF")

_triton = torch.library.Library("vlm_triton", "DEF")


class _Definition(NamedTuple):
    """What one call of :func:`define` said of an operator, and the module that called."""

    schema: str
    owner: str
    reference: Callable[..., Any]
    fake: Callable[..., Any] | None
    kernel: str | None
    kernel_fake: Callable[..., Any] | None
    backward: bool


_DEFINED: dict[str, _Definition] = {}
"""The definition of each operator that holds now. What is registered with torch, for good, looks here in each call."""

_LOCK = threading.RLock()

_replaced = 0


def replaced() -> int:
    """How many definitions have taken the place of an earlier one: what was lowered at another count may be stale."""
    return _replaced


def define(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any] | None = None,
    *,
    kernel: str | None = None,
    kernel_fake: Callable[..., Any] | None = None,
    backward: bool = False,
    flops: Callable[..., int] | None = None,
    flops_by_value: bool = False,
    scratch: Callable[..., int] | None = None,
) -> None:
    """Register ``vlm::<schema>`` with its reference, and ``vlm_triton::<schema>`` if it has a kernel.

    With a ``fake`` the operator is opaque to tracing; without one, tracing sees through it to the reference.

    The module that defined an operator may define it again with the same schema, as a notebook does when a cell is run
    again: the new definition takes the old one's place. A model that a recipe is applied to uses it from its next call
    on, a :class:`vlmrewrite.Program` from its next run. What you compiled with ``torch.compile`` yourself is not
    compiled again.

    Args:
        schema: as for ``torch.library.define``, without a namespace.
        reference: what the operator means.
        fake: shapes, dtypes and strides of its outputs.
        kernel: ``"package.module:launcher"``, imported when it first runs; it takes what the operator takes.
        kernel_fake: the outputs of the launcher; by default ``fake``, or without one the reference on fake tensors.
        backward: the kernel's operator can be differentiated; its gradient is the reference's, computed again.
        flops: its FLOPs, see ``torch.utils.flop_counter.register_flop_formula``.
        flops_by_value: ``flops`` takes the tensors themselves, not their shapes.
        scratch: about how many bytes the reference holds inside, given what it takes; for predictions of peak memory,
            where the numbers in tensors are not known.

    Raises:
        ValueError: the schema cannot be used; or the operator is there already, and was defined by another module, or
            with another schema, or with a fake, a kernel or a backward where there is none now or the reverse. The
            earlier definition holds.
    """
    global _replaced
    name, owner = schema.split("(", 1)[0].strip(), _module_of(inspect.currentframe())
    if owner.partition(".")[0] != "vlmrewrite":
        importlib.import_module("vlmrewrite.passes")  # whose operators have their names before anybody else takes them
    new = _Definition(schema, owner, reference, fake, kernel, kernel_fake, backward)
    with _LOCK:
        old = _DEFINED.get(name)
        if old is None:
            _register(name, schema, new)
        else:
            _check_same(name, old, new)
        _DEFINED[name] = new
        packet = getattr(torch.ops.vlm, name)
        REFERENCES[packet.default] = reference
        SCRATCH.pop(packet.default, None)
        if scratch is not None:
            SCRATCH[packet.default] = scratch
        packets = [packet] if kernel is None else [packet, getattr(torch.ops.vlm_triton, name)]
        for one in packets:
            flop_registry.pop(one, None)
        if flops is not None:
            register_flop_formula(packets, get_raw=flops_by_value)(flops)
        if old is not None and old[2:] != new[2:]:
            _replaced += 1  # last: what is lowered at the new count takes the new definition


def _module_of(frame: FrameType | None) -> str:
    """The name of the module that called what runs in a frame."""
    caller = None if frame is None else frame.f_back
    return str(caller.f_globals.get("__name__") if caller is not None else None)


def _check_same(name: str, old: _Definition, new: _Definition) -> None:
    """Raise ValueError unless the new definition may take the old one's place."""
    there = f"vlm::{name} is defined already"
    if old.owner != new.owner:
        raise ValueError(f"{there}, by {old.owner}, got another definition by {new.owner}: choose another name")
    if "".join(old.schema.split()) != "".join(new.schema.split()):
        raise ValueError(
            f"{there}, as {old.schema!r}; expected the same schema, or another name, got {new.schema!r} (to change a"
            " schema, start Python again)"
        )
    for what in ("fake", "kernel", "backward"):
        had, has = (f"{'with' if getattr(one, what) else 'without'} a {what}" for one in (old, new))
        if had != has:
            raise ValueError(f"{there}, {had}; expected a definition {had}, or another name, got one {has}")


def _register(name: str, schema: str, new: _Definition) -> None:
    """Tell torch of an operator; what it runs is looked up in each call."""
    if not name.isidentifier() or "(" not in schema:
        raise ValueError(f"expected a schema such as 'name(Tensor x, int k) -> Tensor', got {schema!r}")
    try:
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    except RuntimeError as e:
        raise ValueError(f"the schema {schema!r} cannot be used: {' '.join(str(e).split())}") from e
    key = "CompositeImplicitAutograd" if new.fake is None else "CompositeExplicitAutograd"
    _library.impl(name, functools.partial(_computed, name), key)
    operator = getattr(torch.ops.vlm, name).default
    if new.fake is not None:

        def fake(*args: Any, **kwargs: Any) -> Any:
            made = _DEFINED[name].fake
            assert made is not None
            return made(*args, **kwargs)

        torch.library.register_fake(f"vlm::{name}", fake, lib=_library)
        OPAQUE.add(operator)
    if new.kernel is not None:
        KERNELS[operator] = _register_kernel(name, schema, new.backward)


def _computed(name: str, *args: Any, **kwargs: Any) -> Any:
    """What an operator's reference returns; an error says which operator was given what."""
    try:
        return _DEFINED[name].reference(*args, **kwargs)
    except Exception as e:
        e.add_note(f"in {getattr(torch.ops.vlm, name).default}, given {kinds((*args, *kwargs.values()))}")
        raise


def kinds(arguments: Iterable[object]) -> str:
    """Arguments in words, such as ``(float32 [12, 64], bool [12], 0.5)``."""

    def kind(x: object) -> str:
        return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}" if isinstance(x, Tensor) else shown(x)

    return f"({', '.join(map(kind, arguments))})"


def _register_kernel(name: str, schema: str, backward: bool) -> Any:
    """Tell torch of an operator's kernel; returns the operator that runs it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        device = next(x.device for x in args if isinstance(x, Tensor))
        if (reason := kernels_missing(device)) is not None:
            raise RuntimeError(f"vlm_triton::{name} cannot run on {device}: {reason}; expected a graph lowered for it")
        launch = launcher(str(_DEFINED[name].kernel))
        if device.type != "cuda" or device.index == torch.cuda.current_device():
            return launch(*args, **kwargs)
        with torch.cuda.device(device):  # Triton launches on the current one
            return launch(*args, **kwargs)

    def fake(*args: Any, **kwargs: Any) -> Any:
        now = _DEFINED[name]
        return (now.kernel_fake or now.fake or now.reference)(*args, **kwargs)

    _triton.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _triton.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"vlm_triton::{name}", fake, lib=_triton)
    if backward:
        through = _through(lambda *args: _DEFINED[name].reference(*args))
        torch.library.register_autograd(f"vlm_triton::{name}", through, setup_context=remember, lib=_triton)
    return getattr(torch.ops.vlm_triton, name).default


def _through(reference: Callable[..., Any]) -> Callable[..., Any]:
    """The gradient of an operator, from its inputs and its reference."""

    def compute(gradients: Any, inputs: Any, wanted: Any) -> list[Tensor | None]:
        return [g for _, g in recomputed(reference, gradients, inputs, wanted)]

    return lambda ctx, *gradients: given_back(ctx, gradients, compute)
