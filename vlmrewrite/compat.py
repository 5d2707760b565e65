"""Private interfaces of torch, transformers and Triton that are used, each behind one function with a test of its own.

They may change with any release. Where one is missing, the error names it and the version that is installed; what the
functions do is checked in ``tests/test_compat.py``, which `make oldest` runs with the oldest versions too.
"""

from __future__ import annotations

import contextlib
import importlib
import operator
import os
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch.fx
from torch import Tensor, nn
from torch.nn.modules import module as _module

TESTED = {"torch": ">=2.11,<2.14", "transformers": ">=5.23,<5.24", "triton": ">=3.6,<3.10"}
"""The versions that the tests pass with, as in pyproject.toml."""


class VersionError(RuntimeError):
    """Something private that is needed is not in the installed version of torch, transformers or Triton."""


def _lacking(package: str, what: str) -> VersionError:
    try:
        found = f"{package} {getattr(importlib.import_module(package), '__version__', 'of an unknown version')}"
    except ImportError:
        return VersionError(f"{package} is not installed, and {what} is needed: install {package}{TESTED[package]}")
    return VersionError(f"{found} has no {what} as vlmrewrite needs it: install {package}{TESTED[package]}")


def _find(module: str, name: str) -> Any:
    """What a module calls so.

    Raises:
        VersionError: there is no such module, or no such name in it.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise _lacking(module.partition(".")[0], f"{module}.{name}") from error


def _attribute(of: Any, path: str, package: str) -> Any:
    """An attribute, or one of an attribute.

    Raises:
        VersionError: there is none.
    """
    try:
        return operator.attrgetter(path)(of)
    except AttributeError as error:
        kind = of if isinstance(of, type) else type(of)
        raise _lacking(package, f"{kind.__name__}.{path}") from error


def memory_is_shared(x: Tensor, owners: int) -> bool:
    """Whether more than ``owners`` tensors refer to the memory of ``x``."""
    storage = x.untyped_storage()  # one reference more
    return int(_find("torch._C", "_storage_Use_Count")(_attribute(storage, "_cdata", "torch"))) > owners + 1


def tree_flatten(tree: Any) -> tuple[list[Any], Any]:
    """What lies in nested lists, tuples and dicts, and how it lies there."""
    leaves, spec = _find("torch.utils._pytree", "tree_flatten")(tree)
    return leaves, spec


def tree_unflatten(leaves: list[Any], spec: Any) -> Any:
    """What :func:`tree_flatten` took apart."""
    return _find("torch.utils._pytree", "tree_unflatten")(leaves, spec)


def tree_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """What lies in nested lists, tuples and dicts.

    Args:
        is_leaf: what else is not to be looked into.
    """
    leaves: list[Any] = _find("torch.utils._pytree", "tree_leaves")(tree, is_leaf=is_leaf)
    return leaves


def hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks of a module that run around its forward and its backward."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [hook for name in names for hook in _attribute(module, name, "torch").values()]


def global_hooks() -> int:
    """How many hooks there are on all modules. Traced code may ask: Dynamo guards on what is read."""
    return len(_module._global_forward_hooks) + len(_module._global_forward_pre_hooks)


def is_compiled(model: Any) -> bool:
    """Whether ``torch.compile(model)`` returned it, or ``model.compile()`` was called."""
    compiled, name = _find("torch._dynamo", "OptimizedModule"), "_compiled_call_impl"
    _attribute(nn.Module, name, "torch")
    return isinstance(model, compiled) or getattr(model, name, None) is not None


def gpu_sleep(cycles: int) -> None:
    """Let the current stream of the GPU do nothing for so many of its cycles."""
    _find("torch.cuda", "_sleep")(cycles)


def gpu_architecture() -> int:
    """What Triton compiles for: 90 on Hopper."""
    return int(_attribute(_find("triton.runtime", "driver"), "active.get_current_target", "triton")().arch)


def attention_implementation(config: Any) -> str | None:
    """The attention implementation that modules with this config use."""
    name: str | None = _attribute(config, "_attn_implementation", "transformers")
    return name


def set_attention_implementation(config: Any, name: str) -> None:
    """Let modules with this config use an attention implementation, and none of the configs inside it.

    (The public setter goes on to the inner configs, and checks what vlmrewrite's implementation need not meet.)
    """
    config._attn_implementation_internal = name
    if attention_implementation(config) != name:
        raise _lacking("transformers", f"{type(config).__name__}._attn_implementation_internal")


def generation_positions(model: nn.Module, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The position ids that ``generate()`` would give a prompt."""
    positions: Tensor = _attribute(model, "_prepare_position_ids_for_generation", "transformers")(input_ids, kwargs)
    return positions


def inside_torch_compile() -> bool:
    """Whether the caller runs, traced or not, in code that is behind ``torch.compile``."""
    if torch.compiler.is_dynamo_compiling():  # first: the rest cannot be traced
        return True
    return callable(_find("torch._C._dynamo.eval_frame", "get_eval_frame_callback")())


def forget_code(code: Any) -> None:
    """Drop what Dynamo compiled for a code object."""
    _find("torch._C._dynamo.eval_frame", "reset_code")(code)


def graph_limit() -> int:
    """How many graphs Dynamo makes of one code object."""
    return int(_find("torch._dynamo.config", "recompile_limit"))


def at_graph_limit() -> type[Exception]:
    """What Dynamo raises where it would make one graph more than :func:`graph_limit`."""
    raised: type[Exception] = _find("torch._dynamo.exc", "FailOnRecompileLimitHit")
    return raised


def untraceable() -> tuple[type[Exception], ...]:
    """What Dynamo raises where it cannot make one graph of what a function does."""
    return tuple(_find("torch._dynamo.exc", name) for name in ("Unsupported", "UserError"))


@contextlib.contextmanager
def graphs_allowed(limit: int) -> Iterator[None]:
    """Let Dynamo make more graphs of one code object."""
    with _patched("torch._dynamo.config", recompile_limit=limit):
        yield


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
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):  # global_hooks cannot check while it is traced
        _find("torch.nn.modules.module", name)
    return _behind_dynamo(function, backend, lambda: tracing_options(recompile_limit=recompile_limit()), traced)


def inductor(gm: torch.fx.GraphModule) -> Callable[..., Any]:
    """``torch.compile(gm, backend="inductor", fullgraph=True, dynamic=True)``: it runs as one piece or it raises."""

    @contextlib.contextmanager
    def options() -> Iterator[None]:
        with (
            _find("torch._dynamo.convert_frame", "compile_lock"),
            _patched("torch._dynamo.config", assume_static_by_default=False),
            _compiling_here_alone(),
        ):
            yield

    def run(*inputs: Any) -> Any:
        return gm(*inputs)

    # Code of its own: Dynamo leaves torch.fx's uncompiled while another thread compiles.
    own = types.FunctionType(run.__code__.replace(), run.__globals__, gm.__class__.__name__, None, run.__closure__)
    return _behind_dynamo(own, "inductor", options, lambda _: None)


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
    context: Any = _find("torch._dynamo", "optimize")(backend, nopython=True)
    context.callback = _Tracer(_attribute(context, "callback", "torch"), options, traced)
    if hasattr(context, "fullgraph"):  # counts frames for the whole process, in torch 2.13, so that threads miss theirs
        context.fullgraph = False  # what raises at a graph break is the callback
    made: Callable[..., Any] = context(function)
    _blind_to_fx_tracing(made.forward if isinstance(made, nn.Module) else made)
    return made


def _blind_to_fx_tracing(wrapper: Any) -> None:
    """Let a function behind Dynamo run its graph also while another thread is inside a tracer of torch.fx.

    Inductor is, while it compiles. Whether anything traces is one flag of the process, and Dynamo leaves its functions
    uncompiled while it is set.
    """
    names = wrapper.__code__.co_freevars
    if "is_fx_symbolic_tracing" in names:
        wrapper.__closure__[names.index("is_fx_symbolic_tracing")].cell_contents = lambda: False


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


@contextlib.contextmanager
def tracing_options(**dynamo: Any) -> Iterator[None]:
    """Dynamo options of a capture, under Dynamo's lock: every axis a symbol of its own, Python floats as constants.

    Hooks on modules are guarded: a graph is captured again where they have changed. What transformers checks of tensors
    (``torch_compilable_check``) is left out: the host has compared the number of tokens and features, and torch 2.11
    cannot trace it.
    """
    with (
        _find("torch._dynamo.convert_frame", "compile_lock"),
        _environment("TRANSFORMERS_DISABLE_TORCH_CHECK", "1"),
        _patched("torch.fx.experimental._config", use_duck_shape=False),
        _patched("torch._dynamo.config", **_OPTIONS, **dynamo),
        _symbols_in_messages(),
        _compiling_here_alone(),
    ):
        yield


@contextlib.contextmanager
def _patched(module: str, **options: Any) -> Iterator[None]:
    before = {name: _find(module, name) for name in options}
    config = importlib.import_module(module)
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
    with _patched("torch.compiler", _compile_session_context=contextlib.nullcontext):
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
