"""Dynamo's front end around a model's own forward: each way of calling it becomes one graph, that outlives recipes."""

from __future__ import annotations

import inspect
import re
import threading
import types
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar, cast

import torch
import torch.fx
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmrewrite.compat import at_graph_limit, captured, forget_code, global_hooks, graph_limit, hooks_of, untraceable
from vlmrewrite.errors import CaptureError
from vlmrewrite.hf import Encoded, parameter_inputs
from vlmrewrite.kvcache import PositionCache

T = TypeVar("T")
Runner = Callable[["Graph", Sequence[Any]], Any]

LIMIT = 24
"""Graphs of one model before giving up: with or without gradient, padding, a past, one row or more, one logit or all
make different graphs, so that Dynamo's default of 8 is soon used up."""

_OURS = ("past_key_values", "use_cache", "mm_encoder_outputs", "return_dict")

_RUNNER: ContextVar[Runner] = ContextVar("vlmrewrite_runner")
"""What does the work of each graph in the call that is running."""


def limit() -> int:
    """How many graphs there may be of one model; torch._dynamo.config.recompile_limit raises it."""
    return max(LIMIT, graph_limit())


class Graph:
    """One captured graph of a model.

    Attributes:
        gm: the graph.
        features: which of its inputs holds the vision features; None before its first run, and of a graph of text.
        parameters: for each of its inputs that is a decoder layer's parameter, the layer and the name within it.
        derived: what later stages made of it, by their own keys; it dies with the graph.
        lock: held while something is derived.
    """

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self.gm = gm
        self.features: int | None = None
        self.parameters: dict[str, tuple[int, str]] = {}
        self.derived: dict[object, Any] = {}
        self.lock = threading.RLock()

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What was derived under a key; made at the first request for it, by one thread."""
        if key not in self.derived:
            with self.lock:
                if key not in self.derived:
                    self.derived[key] = make()
        return cast(T, self.derived[key])


class CapturedForward:
    """A model's forward behind Dynamo.

    It owns its graphs; what Dynamo keeps refers to them weakly, so that they die with the model: Dynamo never forgets a
    backend, nor what the backend holds.

    Attributes:
        forward: the model's class's.
        graphs: those captured so far.
        seconds: what tracing each of them took.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.graphs: list[Graph] = []
        self.seconds: list[float] = []
        me: Any = weakref.ref(self)  # alive while it is called, and Dynamo runs what is here at no other time

        def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            me().graphs.append(graph := Graph(gm))
            this: Any = weakref.ref(graph)
            return lambda *inputs: _RUNNER.get()(this(), inputs)  # None: forgotten by another thread as it was traced

        # A code object of its own: Dynamo counts recompiles per code object, and models must not share the limit.
        own = types.FunctionType(_entry.__code__.replace(), _entry.__globals__, "vlmrewrite_entry")
        self._compiled = captured(own, backend, limit, self.seconds.append)
        # What Dynamo made of a code object keeps it alive, by way of the module's globals.
        weakref.finalize(self, forget_code, own.__code__).atexit = False
        self.forward, self._code = forward, own.__code__
        # The same names in every call: Dynamo cannot explain a recompile over a tensor that is no longer among them.
        parameters = inspect.signature(forward).parameters.values()
        self._absent = {p.name: None for p in parameters if p.default is None and p.name not in _OURS}

    def __call__(
        self, runner: Runner, model: nn.Module, cache: PositionCache, kwargs: dict[str, Any], images: Encoded | None
    ) -> Any:
        """Run (and trace if new) the forward.

        Args:
            runner: does the work of the graph in this call; given the graph and its flat inputs.
            model, cache, kwargs: what the forward takes.
            images: those of the call; None for a decode step, or a prompt of text.

        Raises:
            ValueError: the images' features are not exactly one of the graph's inputs.
            RuntimeError: the forward could not be captured as one graph, or something else ran in place of the graph.
        """
        ran, graphs = list[Graph](), self.graphs  # these live as long as this call, whatever another thread forgets

        def noted(graph: Graph | None, inputs: Sequence[Any]) -> Any:
            if graph is None:
                raise NotCapturedError("another thread called this model where torch.compile does nothing: call again")
            ran.append(graph)
            if images is not None and graph.features is None:
                graph.parameters = parameter_inputs(model, graph.gm, inputs)
                graph.features = place_of(images.features, inputs)
            return runner(graph, inputs)

        pooled: Any = None
        if images is not None:
            cache.contiguous()
            pooled = [images.features] if images.as_list else images.features
        token = _RUNNER.set(noted)
        try:
            out = self._compiled(self.forward, model, cache, self._absent | kwargs, pooled)
            if not ran:
                raise NotCapturedError(
                    "another backend of torch.compile ran in place of the rewritten graph: leave"
                    " torch.compiler.set_stance(force_backend=...)"
                )
            return out
        except NotCapturedError:
            forget_code(self._code)  # or Dynamo would never look at it again
            self.graphs, self.seconds[:] = [], []
            raise
        except at_graph_limit() as e:
            raise RuntimeError(
                f"{len(graphs)} graphs of this model were compiled and the limit is reached; raise"
                f" torch._dynamo.config.recompile_limit above it{_hooked(model)}. The unrewritten model is not run in"
                " its place."
            ) from e
        except untraceable() as e:
            what = f"the forward of {type(model).__name__} could not be captured as one graph{_hooked(model)}"
            raise CaptureError(f"{what}: {str(e)[:2000]}", f"{what}: {_reason(str(e))}") from e
        finally:
            _RUNNER.reset(token)


def _entry(own: Callable[..., Any], model: nn.Module, cache: PositionCache, kwargs: dict[str, Any], pooled: Any) -> Any:
    """What is traced: the model's own forward, with its images encoded.

    Args:
        pooled: the features, [I, N, C] or a list of one [F, C]; None for a decode step, or a prompt without an image.
    """
    global_hooks()  # read, so that Dynamo guards on it
    if not torch.compiler.is_dynamo_compiling():
        raise NotCapturedError(
            "torch.compile does nothing here, and the rewritten graph is behind it: leave the TorchDispatchMode that is"
            " active (FlopCounterMode is one), torch.compiler.set_stance('force_eager'), or TORCH_COMPILE_DISABLE=1"
        )
    if pooled is not None:
        kwargs = kwargs | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=pooled)}}
    return own(model, past_key_values=cache, use_cache=True, return_dict=True, **kwargs)


class NotCapturedError(RuntimeError):
    """Something else ran in place of a captured graph."""


def _reason(text: str) -> str:
    """What Dynamo says first, its details, and the innermost source line, of the many lines in its message."""
    lines = [line.strip() for line in text.splitlines()]
    details = [line.partition(": ")[2] for line in lines if line.startswith("Developer debug context: ")]
    places = re.findall(r'File "(?:[^"]*/)?([^"/]+)", line (\d+)', text)
    at = [f"({places[-1][0]}, line {places[-1][1]})"] if places else []
    return " ".join([*lines[:1], *details[:1], *at])


def _hooked(model: nn.Module) -> str:
    """Where hooks stand, which are captured with the forward, for an error message."""
    found = []
    for name, module in model.named_modules():
        hooks = hooks_of(module)
        if any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
            found.append(name or "the model")
    if not found:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f" (there are hooks on {', '.join(found[:3])}{more}: expected hooks that Dynamo can trace, or none)"


class Captures:
    """A model behind Dynamo. Outlives a session, so that applying again need not capture again.

    Attributes:
        call, text: the forward as it is called with images, and without.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.call, self.text = CapturedForward(forward), CapturedForward(forward)


def place_of(features: Tensor, inputs: Sequence[Any]) -> int:
    """Which of a graph's flat inputs the vision features are: the very tensor, not one like it.

    Raises:
        ValueError: none, or more than one.
    """
    found = [i for i, x in enumerate(inputs) if x is features]
    if len(found) != 1:
        raise ValueError(f"{len(found)} of the graph's inputs are the vision features; expected 1: is there an image?")
    return found[0]


CAPTURES: weakref.WeakKeyDictionary[nn.Module, Captures] = weakref.WeakKeyDictionary()


def captures_of(model: nn.Module) -> Captures:
    """The model's captures; new if its class's forward has been exchanged since."""
    forward = type(model).forward
    found = CAPTURES.get(model) or CAPTURES.setdefault(model, Captures(forward))  # at once for all threads, unlocked
    if found.call.forward is not forward:
        found = CAPTURES[model] = Captures(forward)
    return found
