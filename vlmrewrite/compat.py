"""Private interfaces of torch and transformers that are used, each behind one function with a test of its own."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.config
import torch._dynamo.convert_frame
import torch.fx
import torch.fx.experimental._config
from torch import Tensor


def memory_is_shared(x: Tensor, owners: int) -> bool:
    """Whether more than ``owners`` tensors refer to the memory of ``x``."""
    storage = x.untyped_storage()  # one reference more
    return int(torch._C._storage_Use_Count(storage._cdata)) > owners + 1


def inside_torch_compile() -> bool:
    """Whether the caller runs, traced or not, in code that is behind ``torch.compile``."""
    from torch._C._dynamo.eval_frame import get_eval_frame_callback

    return torch.compiler.is_dynamo_compiling() or callable(get_eval_frame_callback())


def forget_code(code: Any) -> None:
    """Drop what Dynamo compiled for a code object."""
    from torch._C._dynamo.eval_frame import reset_code

    reset_code(code)


def captured(
    function: Callable[..., Any],
    backend: Callable[..., Any],
    recompile_limit: Callable[[], int],
    traced: Callable[[float], None],
) -> Callable[..., Any]:
    """``torch.compile(function, backend=backend, fullgraph=True, dynamic=True)`` with a capture's options.

    Args:
        recompile_limit: how many graphs there may be.
        traced: told the seconds of each trace.
    """
    return _behind_dynamo(function, backend, lambda: tracing_options(recompile_limit=recompile_limit()), traced)


def inductor(gm: torch.fx.GraphModule) -> Callable[..., Any]:
    """``torch.compile(gm, backend="inductor", fullgraph=True, dynamic=True)``: it runs as one piece or it raises."""

    @contextlib.contextmanager
    def options() -> Iterator[None]:
        with torch._dynamo.convert_frame.compile_lock, _patched(torch._dynamo.config, assume_static_by_default=False):
            yield

    return _behind_dynamo(gm, "inductor", options, lambda _: None)


def _behind_dynamo(
    function: Callable[..., Any],
    backend: str | Callable[..., Any],
    options: Callable[[], contextlib.AbstractContextManager[None]],
    traced: Callable[[float], None],
) -> Callable[..., Any]:
    """A function behind Dynamo, whose options are set while it traces and at no other time.

    It is under Dynamo's own lock then, so that no other capture in the process sees them. A call for which there is a
    graph takes no lock and changes nothing. (``dynamic=True`` of ``torch.compile`` is an option that it would set at
    each call: for all threads, in torch 2.11.)
    """
    context: Any = torch._dynamo.optimize(backend, nopython=True)
    context.callback = _Tracer(context.callback, options, traced)
    made: Callable[..., Any] = context(function)
    return made


class _Tracer:
    """What Dynamo calls where no graph fits."""

    def __init__(
        self,
        inner: Any,
        options: Callable[[], contextlib.AbstractContextManager[None]],
        traced: Callable[[float], None],
    ) -> None:
        self.__dict__.update(vars(inner))
        self._torchdynamo_orig_backend = self._inner = inner
        self._options, self._traced = options, traced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            with self._options():
                return self._inner(*args, **kwargs)
        finally:
            self._traced(time.perf_counter() - begun)


_OPTIONS = {"assume_static_by_default": False, "specialize_float": True, "skip_nnmodule_hook_guards": False}
_tracing = threading.local()


@contextlib.contextmanager
def tracing_options(**dynamo: Any) -> Iterator[None]:
    """Dynamo options of a capture, under Dynamo's lock: every axis a symbol of its own, Python floats as constants.

    Hooks on modules are guarded: a graph is captured again where they have changed. What transformers checks of tensors
    (``torch_compilable_check``) is left out: the host has compared the number of tokens and features, and torch 2.11
    cannot trace it.
    """
    with torch._dynamo.convert_frame.compile_lock:
        if getattr(_tracing, "depth", 0):  # of the same thread, whose options these are
            yield
            return
        _tracing.depth = 1
        try:
            with (
                _environment("TRANSFORMERS_DISABLE_TORCH_CHECK", "1"),
                _patched(torch.fx.experimental._config, use_duck_shape=False),
                _patched(torch._dynamo.config, **_OPTIONS, **dynamo),
                _symbols_in_messages(),
                _compiling_here_alone(),
            ):
                yield
        finally:
            _tracing.depth = 0


@contextlib.contextmanager
def _patched(config: Any, **options: Any) -> Iterator[None]:
    before = {name: getattr(config, name) for name in options}
    try:
        for name, value in options.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextlib.contextmanager
def _compiling_here_alone() -> Iterator[None]:
    """Torch 2.13 makes ``torch.compiler.is_compiling()`` true in every thread while one traces; torch 2.11 does not.

    transformers asks it in eager code: a vision tower that runs meanwhile in another thread loses its hidden states.
    In traced code Dynamo answers by itself.
    """
    if not hasattr(torch.compiler, "_compile_session_context"):
        yield
        return
    with _patched(torch.compiler, _compile_session_context=contextlib.nullcontext):
        yield


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _symbols_in_messages() -> Iterator[None]:
    """An f-string in an error message makes Dynamo pin the symbol in it; print the symbol's name instead."""
    from torch._dynamo.variables import lazy

    kind = getattr(lazy, "LazySymNodeFormatString", None)
    if kind is None:
        yield
        return
    before = kind.__repr__

    def as_symbol(self: Any) -> str:
        node = getattr(self.sym_node_var.sym_num, "node", None)
        return str(getattr(node, "expr", self.sym_node_var.sym_num))

    kind.__repr__ = as_symbol
    try:
        yield
    finally:
        kind.__repr__ = before
