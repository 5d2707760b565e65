"""Dynamo's front end around a model's own forward: each way of calling it becomes one graph, that outlives recipes."""

from __future__ import annotations

import inspect
import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

from torch import nn

from vlmrewrite.analysis import try_operators
from vlmrewrite.capture.alike import Alike
from vlmrewrite.capture.expand import UnlikeError, reason_of
from vlmrewrite.capture.graph import Graph
from vlmrewrite.capture.traces import CALLER, Caller, NotCapturedError, form_of, traces_of
from vlmrewrite.compat import at_graph_limit, global_hooks, graph_limit, untraceable, untraced
from vlmrewrite.errors import CaptureError
from vlmrewrite.hf import Encoded, hooked, parameter_inputs, scattered
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.ops import keep_whole, know

_LOG = logging.getLogger(__name__)

Runner = Callable[["Graph", Sequence[Any]], Any]

LIMIT = 24
"""Graphs of one model before giving up: with or without gradient, padding, a past, one row or more, one logit or all
make different graphs, so that Dynamo's default of 8 is soon used up."""

_CAPTURED = "%s captured (called with %s) in %.2f s: %d nodes, %d layers as copies"
"""In no time if a model like it was captured before."""

_OURS = ("past_key_values", "use_cache", "mm_encoder_outputs", "return_dict")


def limit() -> int:
    """How many graphs there may be of one model; torch._dynamo.config.recompile_limit raises it."""
    return max(LIMIT, graph_limit())


class CapturedForward:
    """A model's forward behind Dynamo.

    Attributes:
        forward: the model's class's.
        seconds: what tracing took, each time that a call of this model led to it.
        whole: why all layers are traced, although some seemed alike; None where that is not so.
    """

    def __init__(self, forward: Callable[..., Any], form: tuple[Any, ...], role: str) -> None:
        self.forward = forward
        self.seconds: list[float] = []
        self._traces = traces_of(forward, form, role, limit)
        self._ran: weakref.WeakSet[Graph] = weakref.WeakSet()
        self.whole: str | None = None
        self._alike: Alike | None = None
        self._lock = threading.Lock()
        # The same names in every call: Dynamo cannot explain a recompile over a tensor that is no longer among them.
        parameters = inspect.signature(forward).parameters.values()
        self._absent = {p.name: None for p in parameters if p.default is None and p.name not in _OURS}

    @property
    def graphs(self) -> list[Graph]:
        """Those that ran so far; a model of the same form may have captured them."""
        return [graph for graph in self._traces.graphs if graph in self._ran]

    def __call__(
        self,
        runner: Runner,
        model: nn.Module,
        cache: PositionCache,
        kwargs: dict[str, Any],
        images: Mapping[str, Encoded] | None,
        whole: nn.Module | None = None,
    ) -> Any:
        """Run (and trace if new) the forward.

        Args:
            runner: does the work of the graph in this call; given the graph and its flat inputs.
            model, cache, kwargs: what the forward takes.
            images: images and videos of the call; None for a decode step, or a prompt of text.
            whole: what the model is a part of, by whose names its modules are called in errors.

        Raises:
            ValueError: the images' features are not exactly one of the graph's inputs.
            CaptureError: the forward could not be captured as one graph.
            RuntimeError: something else ran in place of the graph, or there would be too many graphs.
        """
        known = know(whole or model)
        if (alike := self._look(model)) is not None:
            try:
                return self._run(runner, model, cache, kwargs, images, whole, alike)
            except UnlikeError as e:
                self.whole = str(e)
                _LOG.info("all layers of %s are traced: %s", type(whole or model).__name__, self.whole)
        try:
            return self._run(runner, model, cache, kwargs, images, whole)
        except CaptureError as e:
            if not keep_whole(whole or model, e.details, known):
                raise
        return self(runner, model, cache, kwargs, images, whole)

    @property
    def copied(self) -> int:
        """How many layers of the graphs are copies of layers that are like them."""
        return 0 if self.whole is not None or self._alike is None else len(self._alike.copies)

    def _look(self, model: nn.Module) -> Alike | None:
        """The layers that are alike, if any are."""
        if self.whole is not None or global_hooks():  # which are called for each module, also of a copy
            return None
        if (found := self._alike) is None or not found.still():
            with self._lock:
                if self._alike is found:
                    self._alike = Alike(model, found)
                found = cast(Alike, self._alike)
        return found if found.copies else None

    def _run(
        self,
        runner: Runner,
        model: nn.Module,
        cache: PositionCache,
        kwargs: dict[str, Any],
        images: Mapping[str, Encoded] | None,
        whole: nn.Module | None,
        alike: Alike | None = None,
    ) -> Any:
        ran, _alive = list[Graph](), self._traces.graphs  # in this call, whatever another thread forgets
        before, told = len(self.seconds), [*(images or ["no image"]), *sorted(kwargs)]

        def too_many() -> RuntimeError:
            return RuntimeError(
                f"{len(self.graphs)} graphs of this model were compiled and the limit is reached; raise"
                f" torch._dynamo.config.recompile_limit above it{hooked(whole or model)}. The unrewritten model is not"
                " run in its place."
            )

        def noted(graph: Graph | None, inputs: Sequence[Any]) -> Any:
            if graph is None:
                raise NotCapturedError("another thread called this model where torch.compile does nothing: call again")
            if alike is not None:
                taken = graph.once("layers", lambda: alike.complete(graph.gm, inputs))
                if isinstance(taken, str):
                    raise UnlikeError(taken)
                inputs = [*inputs, *alike.tensors(taken)]
            if graph not in self._ran and len(self.graphs) >= limit():
                raise too_many()
            if graph not in self._ran and _LOG.isEnabledFor(logging.INFO):
                nodes, seconds = len(graph.gm.graph.nodes), sum(self.seconds[before:])
                _LOG.info(_CAPTURED, type(whole or model).__name__, ", ".join(told), seconds, nodes, self.copied)
            ran.append(graph)
            self._ran.add(graph)
            if images is not None and graph.features is None:
                try_operators(graph.gm, dict(zip(graph.gm.graph.find_nodes(op="placeholder"), inputs, strict=True)))
                graph.parameters = parameter_inputs(model, graph.gm, inputs)
                graph.features = {name: places_of(name, one, inputs) for name, one in images.items()}
            return runner(graph, inputs)

        outputs: Any = None
        if images is not None:
            outputs = {name: one.output for name, one in images.items()}
        token = CALLER.set(Caller(noted, alike is None, self.seconds.append))
        try:
            given = (model, "") if alike is None else (alike.short, alike.told)
            with nullcontext() if alike is None else alike.lent(), cache.opened():
                if images is not None:
                    cache.contiguous()
                out = self._traces.run(self._traces.forward, *given, cache, self._absent | kwargs, outputs)
            if not ran:
                raise NotCapturedError(
                    "another backend of torch.compile ran in place of the rewritten graph: leave"
                    " torch.compiler.set_stance(force_backend=...)"
                )
            return out
        except NotCapturedError:
            self._traces.forget()  # or Dynamo would never look at it again
            self.seconds.clear()
            raise
        except at_graph_limit() as e:
            raise too_many() from e
        except untraceable() as e:
            if alike is not None:
                raise UnlikeError(reason_of(e) or untraced(e)) from None
            of = whole or model
            why = scattered(of) or untraced(e) + hooked(of)
            what = f"the forward of {type(of).__name__} could not be captured as one graph: {why}"
            raise CaptureError(what, str(e)) from None
        finally:
            CALLER.reset(token)


class Captures:
    """A model behind Dynamo. Outlives a session, so that applying again need not capture again.

    Attributes:
        call, text: the forward as it is called with images, and without.
        inner: that of a decoder called by itself, with images in its embeddings.
    """

    def __init__(self, model: nn.Module) -> None:
        forward, form = type(model).forward, form_of(model)
        self.call, self.text, self.inner = (CapturedForward(forward, form, x) for x in ("call", "text", "inner"))


def places_of(modality: str, images: Encoded, inputs: Sequence[Any]) -> dict[str, int]:
    """Which of a graph's flat inputs may be the vision features: the very tensors, not some like them; by their names.

    Raises:
        ValueError: none, or one of them twice.
    """
    places: dict[str, int] = {}
    for name, features in images.candidates.items():
        found = [i for i, x in enumerate(inputs) if x is features]
        if len(found) > 1:
            raise ValueError(f"{len(found)} of the graph's inputs are the {modality} features, {name}; expected 1")
        if found:
            places[name] = found[0]
    if not places:
        raise ValueError(
            f"none of the graph's inputs is the {modality} features; expected one of {', '.join(images.candidates)}:"
            f" does the prompt have {modality} tokens?"
        )
    return places


CAPTURES: weakref.WeakKeyDictionary[nn.Module, Captures] = weakref.WeakKeyDictionary()


def captures_of(model: nn.Module) -> Captures:
    """The model's captures; new if its class's forward has been exchanged since."""
    forward = type(model).forward
    found = CAPTURES.get(model) or CAPTURES.setdefault(model, Captures(model))  # at once for all threads, unlocked
    if found.call.forward is not forward:
        found = CAPTURES[model] = Captures(model)
    return found
