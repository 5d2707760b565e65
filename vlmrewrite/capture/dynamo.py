"""Dynamo's front end around a model's own forward: each way of calling it becomes one graph, that outlives recipes."""

from __future__ import annotations

import functools
import inspect
import logging
import threading
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.fx
from torch import nn

from vlmrewrite.analysis import functional
from vlmrewrite.capture.alike import Alike
from vlmrewrite.capture.expand import UnlikeError, reason_of
from vlmrewrite.capture.graph import Graph
from vlmrewrite.compat import (
    at_graph_limit,
    captured,
    forget_code,
    global_hooks,
    graph_limit,
    hooks_of,
    untraceable,
    untraced,
)
from vlmrewrite.errors import CaptureError
from vlmrewrite.hf import Encoded, keeping_all_tokens, parameter_inputs
from vlmrewrite.kvcache import PositionCache

_LOG = logging.getLogger(__name__)

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


class CapturedForward:
    """A model's forward behind Dynamo.

    It owns its graphs; what Dynamo keeps refers to them weakly, so that they die with the model: Dynamo never forgets a
    backend, nor what the backend holds.

    Attributes:
        forward: the model's class's.
        graphs: those captured so far.
        seconds: what tracing each of them took.
        whole: why all layers are traced, although some seemed alike; None where that is not so.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.graphs: list[Graph] = []
        self.seconds: list[float] = []
        self.whole: str | None = None
        self._alike: Alike | None = None
        self._lock = threading.Lock()
        me: Any = weakref.ref(self)  # alive while it is called, and Dynamo runs what is here at no other time

        def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            functional(gm.graph)
            gm.recompile()
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
        if (alike := self._look(model)) is not None:
            try:
                return self._run(runner, model, cache, kwargs, images, whole, alike)
            except UnlikeError as e:
                self.whole = str(e)
                _LOG.info("all layers of %s are traced: %s", type(whole or model).__name__, self.whole)
        return self._run(runner, model, cache, kwargs, images, whole)

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
        ran, graphs = list[Graph](), self.graphs  # these live as long as this call, whatever another thread forgets

        def noted(graph: Graph | None, inputs: Sequence[Any]) -> Any:
            if graph is None:
                raise NotCapturedError("another thread called this model where torch.compile does nothing: call again")
            ran.append(graph)
            if alike is not None:
                try:
                    taken = graph.once("layers", lambda: alike.complete(graph.gm, inputs))
                except UnlikeError:
                    self.graphs.remove(graph)
                    raise
                inputs = [*inputs, *alike.tensors(taken)]
            if images is not None and graph.features is None:
                graph.parameters = parameter_inputs(model, graph.gm, inputs)
                graph.features = {name: places_of(name, one, inputs) for name, one in images.items()}
            return runner(graph, inputs)

        outputs: Any = None
        if images is not None:
            cache.contiguous()
            outputs = {name: one.output for name, one in images.items()}
        token = _RUNNER.set(noted)
        try:
            given = (model, "") if alike is None else (alike.short, alike.told)
            with nullcontext() if alike is None else alike.lent():
                out = self._compiled(self.forward, *given, cache, self._absent | kwargs, outputs)
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
                f" torch._dynamo.config.recompile_limit above it{_hooked(whole or model)}. The unrewritten model is not"
                " run in its place."
            ) from e
        except untraceable() as e:
            if alike is not None:
                raise UnlikeError(reason_of(e) or untraced(e)) from None
            what = f"the forward of {type(whole or model).__name__} could not be captured as one graph: {untraced(e)}"
            raise CaptureError(f"{what}{_hooked(whole or model)}", str(e)) from None
        finally:
            _RUNNER.reset(token)


def _entry(
    own: Callable[..., Any], model: nn.Module, copies: str, cache: PositionCache, kwargs: dict[str, Any], outputs: Any
) -> Any:
    """What is traced: the model's own forward, with its images and videos encoded.

    Args:
        copies: which layers stand-ins take the place of, for Dynamo to guard on.
        outputs: of the vision tower, by modality; None for a decode step, or a prompt without an image.
    """
    global_hooks(), copies == ""  # read, so that Dynamo guards on it
    if not torch.compiler.is_dynamo_compiling():
        raise NotCapturedError(
            "torch.compile does nothing here, and the rewritten graph is behind it: leave the TorchDispatchMode that is"
            " active (FlopCounterMode is one), torch.compiler.set_stance('force_eager'), or TORCH_COMPILE_DISABLE=1"
        )
    if outputs is not None:
        kwargs = kwargs | {"mm_encoder_outputs": outputs}
    return own(model, past_key_values=cache, use_cache=True, return_dict=True, **keeping_all_tokens(kwargs))


class NotCapturedError(RuntimeError):
    """Something else ran in place of a captured graph."""


def _hooked(model: nn.Module) -> str:
    """Where hooks stand, which are captured with the forward, for an error message."""
    found = []
    for name, module in model.named_modules():
        hooks = hooks_of(module)
        if any(not str(getattr(hook, "__module__", "")).startswith(("transformers.", "vlmrewrite.")) for hook in hooks):
            found.append(name or "the model")
    if not found:
        return ""
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f" (there are hooks on {', '.join(found[:3])}{more}: expected hooks that Dynamo can trace, or none)"


class Captures:
    """A model behind Dynamo. Outlives a session, so that applying again need not capture again.

    Attributes:
        call, text: the forward as it is called with images, and without.
        inner: that of a decoder called by itself, with images in its embeddings.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.call, self.text = CapturedForward(forward), CapturedForward(forward)
        self.inner = CapturedForward(_merging(forward))


def _merging(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A decoder's forward that writes the features where they stand already in its embeddings: a merge in the graph."""

    @functools.wraps(forward)
    def merging(decoder: nn.Module, mm_encoder_outputs: Mapping[str, Any], **kwargs: Any) -> Any:
        for one in mm_encoder_outputs.values():
            if one.mask is not None:
                x = kwargs["inputs_embeds"].masked_scatter(one.mask[..., None], one.merged)
                kwargs = kwargs | {"inputs_embeds": x}
        return forward(decoder, **kwargs)

    return merging


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
    found = CAPTURES.get(model) or CAPTURES.setdefault(model, Captures(forward))  # at once for all threads, unlocked
    if found.call.forward is not forward:
        found = CAPTURES[model] = Captures(forward)
    return found
