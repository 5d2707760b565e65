"""A model's captures: each graph outlives the recipe that first needed it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.fx
from torch import Tensor, nn

from vlmrewrite.capture.dynamo import CapturedForward, NotCapturedError, with_images, without_images
from vlmrewrite.hf import Encoded, parameter_inputs
from vlmrewrite.kvcache import PositionCache

T = TypeVar("T")
Runner = Callable[["Graph", Sequence[Any]], Any]


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
        made: T = self.derived[key]
        return made


_RUNNER: ContextVar[Runner] = ContextVar("vlmrewrite_runner")
"""What does the work of each graph in the call that is running."""

_LOCK = threading.Lock()


class Captures:
    """A model behind Dynamo. Outlives a session, so that applying again need not capture again.

    It owns its graphs; what Dynamo keeps refers to them weakly, so that they die with the model.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.call = CapturedForward(forward, with_images, self._new_graph)
        self.text = CapturedForward(forward, without_images, self._new_graph)
        self._graphs: list[Graph] = []

    def _new_graph(self, gm: torch.fx.GraphModule) -> Callable[..., Any]:
        graph = Graph(gm)
        self._graphs.append(graph)
        this = weakref.ref(graph)

        def run(*inputs: Any) -> Any:
            graph = this()
            assert graph is not None
            return _RUNNER.get()(graph, inputs)

        return run

    def run(
        self, runner: Runner, model: nn.Module, cache: PositionCache, images: Encoded, kwargs: dict[str, Any]
    ) -> Any:
        """Run the captured forward with images; ``runner(graph, inputs)`` does the work of each graph.

        Raises:
            ValueError: the images' features are not exactly one of a graph's inputs.
            RuntimeError: the forward could not be captured as one graph.
        """

        def named(graph: Graph, inputs: Sequence[Any]) -> Any:
            if graph.features is None:
                graph.parameters = parameter_inputs(model, graph.gm, inputs)
                graph.features = place_of(images.features, inputs)
            return runner(graph, inputs)

        cache.contiguous()
        return _under(named, self.call, model, cache, kwargs, images.features, images.as_list)

    def run_text(self, runner: Runner, model: nn.Module, cache: PositionCache, kwargs: dict[str, Any]) -> Any:
        """Run the captured forward without images: a decode step, or a prompt of text."""
        return _under(runner, self.text, model, cache, kwargs)


def place_of(features: Tensor, inputs: Sequence[Any]) -> int:
    """Which of a graph's flat inputs the vision features are: the very tensor, not one like it.

    Raises:
        ValueError: none, or more than one.
    """
    found = [i for i, x in enumerate(inputs) if x is features]
    if len(found) != 1:
        raise ValueError(f"{len(found)} of the graph's inputs are the vision features; expected 1: is there an image?")
    return found[0]


def _under(runner: Runner, captured: CapturedForward, *args: Any) -> Any:
    """Call a captured forward; ``runner`` does the work of its graphs, in this call only."""
    ran: list[Graph] = []

    def noted(graph: Graph, inputs: Sequence[Any]) -> Any:
        ran.append(graph)
        return runner(graph, inputs)

    token = _RUNNER.set(noted)
    try:
        out = captured(*args)
    finally:
        _RUNNER.reset(token)
    if not ran:
        captured.forget()
        raise NotCapturedError(
            "another backend of torch.compile ran in place of the rewritten graph: leave"
            " torch.compiler.set_stance(force_backend=...)"
        )
    return out


CAPTURES: weakref.WeakKeyDictionary[nn.Module, Captures] = weakref.WeakKeyDictionary()


def captures_of(model: nn.Module) -> Captures:
    """The model's captures; new if its class's forward has been exchanged since."""
    forward = type(model).forward
    found = CAPTURES.get(model)
    if found is None or found.forward is not forward:
        with _LOCK:
            found = CAPTURES.get(model)
            if found is None or found.forward is not forward:
                found = CAPTURES[model] = Captures(forward)
    return found
