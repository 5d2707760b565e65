"""A model's captures: each graph outlives the recipe that first needed it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx
from torch import nn

from vlmrewrite.capture.dynamo import CapturedForward, with_images, without_images
from vlmrewrite.hf import Encoded, parameter_inputs
from vlmrewrite.kvcache import PositionCache

Runner = Callable[["Graph", Sequence[Any]], Any]


class Graph:
    """One captured graph of a model.

    Attributes:
        gm: the graph.
        parameters: for each of its inputs that is a decoder layer's parameter, the layer and the name within it.
        derived: what later stages made of it, by their own keys; it dies with the graph.
    """

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self.gm = gm
        self.parameters: dict[str, tuple[int, str]] | None = None
        self.derived: dict[object, Any] = {}


class Captures:
    """A model behind Dynamo. Outlives a session, so that applying again need not capture again.

    It owns its graphs; what Dynamo keeps refers to them weakly, so that they die with the model.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.call = CapturedForward(forward, with_images, self._new_graph)
        self.text = CapturedForward(forward, without_images, self._new_graph)
        self.runner: Runner | None = None
        self._graphs: list[Graph] = []

    def _new_graph(self, gm: torch.fx.GraphModule) -> Callable[..., Any]:
        graph = Graph(gm)
        self._graphs.append(graph)
        me, this = weakref.ref(self), weakref.ref(graph)

        def run(*inputs: Any) -> Any:
            owner, graph = me(), this()
            assert owner is not None and graph is not None and owner.runner is not None
            return owner.runner(graph, inputs)

        return run

    @contextlib.contextmanager
    def _running(self, runner: Runner) -> Iterator[None]:
        before, self.runner = self.runner, runner
        try:
            yield
        finally:
            self.runner = before

    def run(
        self, runner: Runner, model: nn.Module, cache: PositionCache, images: Encoded, kwargs: dict[str, Any]
    ) -> Any:
        """Run the captured forward with images; ``runner(graph, inputs)`` does the work of each graph."""

        def named(graph: Graph, inputs: Sequence[Any]) -> Any:
            if graph.parameters is None:
                graph.parameters = parameter_inputs(model, graph.gm, inputs)
            return runner(graph, inputs)

        cache.contiguous()
        with self._running(named):
            return self.call(model, cache, kwargs, images.features, images.as_list)

    def run_text(self, runner: Runner, model: nn.Module, cache: PositionCache, kwargs: dict[str, Any]) -> Any:
        """Run the captured forward without images: a decode step, or a prompt of text."""
        with self._running(runner):
            return self.text(model, cache, kwargs)


CAPTURES: weakref.WeakKeyDictionary[nn.Module, Captures] = weakref.WeakKeyDictionary()


def captures_of(model: nn.Module) -> Captures:
    """The model's captures; new if its class's forward has been exchanged since."""
    forward = type(model).forward
    if model not in CAPTURES or CAPTURES[model].forward is not forward:
        CAPTURES[model] = Captures(forward)
    return CAPTURES[model]
