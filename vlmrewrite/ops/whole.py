"""Linear maps that Dynamo cannot see into, of whatever library: each is one operator, in which the module runs."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import types
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from vlmrewrite.hf import APPLIED, Undo, exchanged, has_sizes, lends, put_forward

_LOG = logging.getLogger(__name__)

_HANDLE, _NAME, _OWN, _KEPT = (f"vlmrewrite_{part}" for part in ("handle", "name", "own_forward", "kept_whole"))
"""Attributes of such a module: a buffer of one number, its name in the model, a forward that somebody had exchanged.
And of the model: all such modules."""

_MODULES: dict[int, weakref.ref[nn.Module]] = {}
"""The module of each handle, by the place of its number in memory."""

_UNDO: ContextVar[Undo | None] = ContextVar("vlmrewrite_undo", default=None)

_LOCK = threading.Lock()

_library = torch.library.Library("vlmrewrite", "DEF")
_library.define("whole(Tensor x, Tensor handle, str name, int out_features) -> Tensor")


def keep_whole(model: nn.Module, failed: str, known: int = 0) -> bool:
    """Let linear maps that Dynamo could not see into be one operator each where it traces.

    It is tried as operators of other libraries are. Elsewhere the modules run as before. A plain ``nn.Linear`` is taken
    only if its forward was exchanged.

    Args:
        model: one that a recipe is applied to, with which this is taken off; or see :func:`whole_until`.
        failed: what Dynamo said, with the stack of source lines.
        known: how many were kept whole when the capture that failed began: see :func:`know`.

    Returns:
        whether there are more by now.
    """
    undo: Undo | None = vars(model).get(APPLIED) or _UNDO.get()
    if undo is None or lends(model):
        return False
    with _LOCK:
        found = {n: m for n, m in model.named_modules() if _is_foreign(m) and _is_named(m, failed)}
        if found and _KEPT not in vars(model):
            undo.put(model, _KEPT, list[nn.Module]())
        for name, module in found.items():
            _place(undo, module, name)
            vars(model)[_KEPT].append(module)
        for at in [at for at, ref in _MODULES.items() if ref() is None]:
            del _MODULES[at]
    if found:
        _LOG.info("kept whole in %s, as Dynamo cannot trace them: %s", type(model).__name__, ", ".join(found))
    return know(model) > known


@contextlib.contextmanager
def whole_until(undo: Undo) -> Iterator[None]:
    """While the block runs, maps of a model without a recipe may be kept whole, and ``undo`` takes that off."""
    token = _UNDO.set(undo)
    try:
        yield
    finally:
        _UNDO.reset(token)


def know(model: nn.Module) -> int:
    """How many maps of a model are kept whole. Notes where their handles are: it may have been copied, or moved."""
    kept: list[nn.Module] = vars(model).get(_KEPT, [])
    for module in kept:
        _MODULES[module.get_buffer(_HANDLE).data_ptr()] = weakref.ref(module)
    return len(kept)


def _place(undo: Undo, module: nn.Module, name: str) -> None:
    undo.put(module, _NAME, name)
    module.register_buffer(_HANDLE, next(_held(module)).new_zeros(1, dtype=torch.int8), persistent=False)
    undo.callback(_forget, module)
    if "forward" in vars(module):
        undo.put(module, _OWN, vars(module)["forward"])
        undo.put(module, "forward", types.MethodType(_forward, module))
    else:
        put_forward(undo, module, types.MethodType(_forward, module))


def _is_foreign(module: nn.Module) -> bool:
    """Whether a module is a linear map of no known kind, and holds what it is made of, and no other map."""
    if not has_sizes(module) or any(map(has_sizes, [*module.modules()][1:])) or _NAME in vars(module):
        return False
    return next(_held(module), None) is not None and (type(module) is not nn.Linear or exchanged(module))


def _held(module: nn.Module) -> Iterator[Tensor]:
    """What a module holds itself."""
    return itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))


def _is_named(module: Any, failed: str) -> bool:
    """Whether a stack of source lines leads through a module's forward."""
    forward = module.forward
    while inner := getattr(forward, "func", None) or getattr(forward, "__func__", None):
        forward = inner
    code = getattr(forward, "__code__", None)
    return code is not None and any(
        f'"{code.co_filename}", line ' in line and line.endswith(f", in {code.co_name}") for line in failed.splitlines()
    )


def _forget(module: nn.Module) -> None:
    if hasattr(module, _HANDLE):
        delattr(module, _HANDLE)


def _own(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    own = vars(module).get(_OWN)
    return type(module).forward(module, *args, **kwargs) if own is None else own(*args, **kwargs)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_dynamo_compiling() and not args and not kwargs:
        return torch.ops.vlmrewrite.whole(x, self.vlmrewrite_handle, self.vlmrewrite_name, self.out_features)
    return _own(self, x, *args, **kwargs)


def _whole(x: Tensor, handle: Tensor, name: str, out_features: int) -> Tensor:
    """What the module gives for x [.., in]: [.., out_features], of the same dtype."""
    known = _MODULES.get(handle.data_ptr())
    module = None if known is None else known()
    if module is None:
        raise RuntimeError(f"{name} is gone, or was moved while the model ran: expected the module of this graph")
    out = _own(module, x)
    if not isinstance(out, Tensor) or (out.shape, out.dtype) != ((*x.shape[:-1], out_features), x.dtype):
        what = f"{out.dtype} {[*out.shape]}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise TypeError(
            f"{name}, a {type(module).__name__} that Dynamo cannot trace, gives {what} for {x.dtype} {[*x.shape]}:"
            f" expected a linear map, which gives {x.dtype} {[*x.shape[:-1], out_features]}"
        )
    return out


def _fake(x: Tensor, handle: Tensor, name: str, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_library.impl("whole", _whole, "CompositeExplicitAutograd")
torch.library.register_fake("vlmrewrite::whole", _fake, lib=_library)
