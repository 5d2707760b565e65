"""Private interfaces of Dynamo: what is behind it, its options while it traces, and what threads share of it."""

from __future__ import annotations

import contextlib
import os
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch.fx
from torch import Tensor
from torch.fx.node import map_arg

from vlmrewrite.compat.private import attribute, find, patched
from vlmrewrite.compat.stored import keep_compiled
from vlmrewrite.progress import waiting


def inside_torch_compile() -> bool:
    """Whether the caller runs, traced or not, in code that is behind ``torch.compile``."""
    if torch.compiler.is_dynamo_compiling():  # first: the rest cannot be traced
        return True
    return callable(find("torch._C._dynamo.eval_frame", "get_eval_frame_callback")())


def forget_code(code: Any) -> None:
    """Drop what Dynamo compiled for a code object."""
    find("torch._C._dynamo.eval_frame", "reset_code")(code)


def graph_limit() -> int:
    """How many graphs Dynamo makes of one code object."""
    return int(find("torch._dynamo.config", "recompile_limit"))


def at_graph_limit() -> type[Exception]:
    """What Dynamo raises where it would make one graph more than :func:`graph_limit`."""
    raised: type[Exception] = find("torch._dynamo.exc", "FailOnRecompileLimitHit")
    return raised


def untraceable() -> tuple[type[Exception], ...]:
    """What Dynamo raises where it cannot make one graph of what a function does."""
    return tuple(find("torch._dynamo.exc", name) for name in ("Unsupported", "UserError", "TorchRuntimeError"))


def stays_where_it_is(tensor: Tensor) -> Tensor:
    """The tensor; compilers are told that it is not moved, so that a CUDA graph writes to it, not to a copy."""
    find("torch._dynamo", "mark_static_address")(tensor, guard=False)
    return tensor


@contextlib.contextmanager
def graphs_allowed(limit: int) -> Iterator[None]:
    """Let Dynamo make more graphs of one code object."""
    with patched("torch._dynamo.config", recompile_limit=limit):
        yield


def captured(
    function: Callable[..., Any],
    backend: Callable[..., Any],
    recompile_limit: Callable[[], int],
    repeats: Callable[[], bool],
    traced: Callable[[float], None],
    fixed: str,
) -> Callable[..., Any]:
    """``torch.compile(function, backend=backend, fullgraph=True, dynamic=True)`` with a capture's options.

    Args:
        recompile_limit: how many graphs there may be.
        repeats: whether what is traced does the same over and over. What operators give for tensors of a form is kept
            then; else, keeping it takes longer than asking again.
        traced: told the seconds of each trace.
        fixed: the function's argument whose parameters have one size in a graph.
    """
    for name in ("_global_forward_hooks", "_global_forward_pre_hooks"):  # global_hooks cannot check while it is traced
        find("torch.nn.modules.module", name)

    @contextlib.contextmanager
    def options() -> Iterator[None]:
        what = "capturing the model, once for each way of calling it"
        how = {"recompile_limit": recompile_limit(), "fake_tensor_cache_enabled": repeats()}
        with waiting(what), tracing_options(**how):
            yield

    def lasting(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        _unguarded("_CAN_RECORD_REGISTRY")
        _of_fixed_sizes(gm.graph, fixed)
        _without_shapes(gm.graph)
        return backend(gm, example_inputs)  # type: ignore[no-any-return]

    return _behind_dynamo(function, lasting, options, traced)


def _unguarded(name: str) -> None:
    """In a backend: let the graph be used whatever becomes of a module's global of this name that was read for it.

    transformers keeps in one table what outputs each class of models can record, and adds to it as a model of another
    class is made. Dynamo guards on the whole table, so that this would have every graph in the process made again; the
    entries of a model's own classes never change.
    """
    context = find("torch._guards", "TracingContext").get()
    guards = attribute(context, "guards_context.dynamo_guards", "torch")
    read = set()
    for guard in guards:
        source = guard.originating_source
        while source is not None and getattr(source, "member", None) != name:
            source = getattr(source, "base", None)
        read |= {source} - {None}
    for source in read:
        attribute(guards, "remove_guards_with_source", "torch")(source)


def _of_fixed_sizes(graph: torch.fx.Graph, argument: str) -> None:
    """In a backend: let parameters and numbers that are reached by way of an argument have the sizes that they have.

    Dynamo does so with plain parameters and with numbers of plain modules; for parameters of other classes, and modules
    of FSDP, there are symbols, which cannot be told from a batch's.
    """
    for node in graph.find_nodes(op="placeholder"):
        source: Any = getattr(node.meta.get("grapharg"), "source", None)
        while getattr(source, "base", None) is not None:
            source = source.base
        if getattr(source, "local_name", None) == argument:
            x = node.meta["example_value"]
            for size in [x] if isinstance(x, torch.SymInt) else x.shape if isinstance(x, torch.nn.Parameter) else ():
                int(size)  # a guard, by which the symbol is a number from here on


def _without_shapes(graph: torch.fx.Graph) -> None:
    """In a backend: put the numbers of each ``torch.Size`` that is made in its place, as other shapes are written."""
    made: list[Any] = graph.find_nodes(op="call_function", target=torch.Size)
    shapes: dict[torch.fx.Node, Any] = {node: tuple(node.args[0]) for node in made}
    for user in {user: None for node in made for user in node.users}:
        user.args, user.kwargs = map_arg((user.args, user.kwargs), lambda n: shapes.get(n, n))
    for node in made:
        graph.erase_node(node)


def inductor(gm: torch.fx.GraphModule) -> Callable[..., Any]:
    """``torch.compile(gm, backend="inductor", fullgraph=True, dynamic=True)``: it runs as one piece or it raises."""

    @contextlib.contextmanager
    def options() -> Iterator[None]:
        keep_compiled()
        with (
            waiting("compiling the rewritten graph with Inductor"),
            find("torch._dynamo.convert_frame", "compile_lock"),
            patched("torch._dynamo.config", assume_static_by_default=False),
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
    context: Any = find("torch._dynamo", "optimize")(backend, nopython=True)
    context.callback = _Tracer(attribute(context, "callback", "torch"), options, traced)
    if hasattr(context, "fullgraph"):  # counts frames for the whole process, in torch 2.13, so that threads miss theirs
        context.fullgraph = False  # what raises at a graph break is the callback
    made: Callable[..., Any] = context(function)
    _blind_to_fx_tracing(made)
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
        with self._options():
            made = self._inner(*args, **kwargs)
        if made.guarded_code is not None:  # it was traced, and not left as it is
            self._traced(time.perf_counter() - begun)
        return made


_OPTIONS: dict[str, Any] = {
    "assume_static_by_default": False,
    "specialize_float": True,
    "skip_nnmodule_hook_guards": False,
}

if hasattr(torch._dynamo.config, "side_effect_replay_policy"):  # no text of each write to the cache, that nobody reads
    _OPTIONS |= {"side_effect_replay_policy": "silent"}


@contextlib.contextmanager
def tracing_options(**dynamo: Any) -> Iterator[None]:
    """Dynamo options of a capture, under Dynamo's lock: every axis a symbol of its own, Python floats as constants.

    Hooks on modules are guarded: a graph is captured again where they have changed. What transformers checks of tensors
    (``torch_compilable_check``) is left out: the host has compared the number of tokens and features, and torch 2.11
    cannot trace it. Parameters are a graph's inputs, also where somebody has Inductor make constants of them.
    """
    with (
        find("torch._dynamo.convert_frame", "compile_lock"),
        _environment("TRANSFORMERS_DISABLE_TORCH_CHECK", "1"),
        patched("torch.fx.experimental._config", use_duck_shape=False),
        patched("torch._dynamo.config", **_OPTIONS, **dynamo),
        patched("torch._inductor.config", freezing=False),
        _symbols_in_messages(),
        _compiling_here_alone(),
    ):
        yield


@contextlib.contextmanager
def _compiling_here_alone() -> Iterator[None]:
    """Torch 2.13 makes ``torch.compiler.is_compiling()`` true in every thread while one traces; torch 2.11 does not.

    transformers asks it in eager code: a vision tower that runs meanwhile in another thread loses its hidden states.
    In traced code Dynamo answers by itself.
    """
    if not hasattr(torch.compiler, "_compile_session_context"):
        yield
        return
    with patched("torch.compiler", _compile_session_context=contextlib.nullcontext):
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
