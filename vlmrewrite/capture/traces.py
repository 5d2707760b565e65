"""What Dynamo made of a forward. Models of one form share it: one like another that is there captures nothing."""

from __future__ import annotations

import functools
import threading
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn

from vlmrewrite.analysis import functional, regions
from vlmrewrite.capture.graph import Graph
from vlmrewrite.compat import captured, forget_code, global_hooks
from vlmrewrite.hf import keeping_all_tokens
from vlmrewrite.kvcache import PositionCache

Forward = Callable[..., Any]


class Caller(NamedTuple):
    """A call that is running.

    Attributes:
        run: does the work of a graph; given the graph, None if it was forgotten since, and its flat inputs.
        whole: whether all layers are traced, also those that are like others.
        traced: told the seconds of a trace.
    """

    run: Callable[[Graph | None, Sequence[Any]], Any]
    whole: bool
    traced: Callable[[float], None]


CALLER: ContextVar[Caller] = ContextVar("vlmrewrite_caller")


class Traces:
    """A forward behind Dynamo, whose guards say which graph is a model's.

    It owns the graphs, which die with the last model of the form: Dynamo never forgets a backend, nor what the backend
    holds, and refers to them weakly.

    Attributes:
        graphs: those captured so far.
        users: how many models there have been.
        run: ``_entry`` behind Dynamo.
    """

    def __init__(self, forward: Forward, limit: Callable[[], int]) -> None:
        self.forward = forward
        self.graphs: list[Graph] = []
        self.users = 0
        me: Any = weakref.ref(self)  # alive while it is called, and Dynamo runs what is here at no other time

        def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            regions(gm.graph, torch.is_grad_enabled())
            functional(gm.graph)
            gm.recompile()
            me().graphs.append(graph := Graph(gm))
            this: Any = weakref.ref(graph)
            return lambda *inputs: CALLER.get().run(this(), inputs)  # None: forgotten by another thread meanwhile

        # A code object of its own: Dynamo counts recompiles per code object, and forms must not share the limit.
        own = types.FunctionType(_entry.__code__.replace(), _entry.__globals__, "vlmrewrite_entry")
        whole, traced = lambda: CALLER.get().whole, lambda seconds: CALLER.get().traced(seconds)
        self.run = captured(own, backend, lambda: limit() * me().users, whole, traced, "model")
        # What Dynamo made of a code object keeps it alive, by way of the module's globals.
        weakref.finalize(self, forget_code, own.__code__).atexit = False
        self._code = own.__code__

    def forget(self) -> None:
        """Drop all graphs."""
        forget_code(self._code)
        self.graphs = []


_KNOWN: weakref.WeakValueDictionary[tuple[Any, ...], Traces] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def form_of(model: nn.Module) -> tuple[Any, ...]:
    """What models have in common that may share graphs: modules and configuration; the rest, Dynamo guards on."""
    modules = tuple((name, type(module)) for name, module in model.named_modules())
    return repr(getattr(model, "config", None)), modules


def traces_of(forward: Forward, form: tuple[Any, ...], role: str, limit: Callable[[], int]) -> Traces:
    """What is shared by models of a form.

    Args:
        forward: the models' class's.
        form: see :func:`form_of`.
        role: what is captured apart from what else is; ``"inner"`` writes features into a decoder's embeddings.
        limit: how many graphs there may be of one model.
    """
    key = (role, forward, *form)
    with _LOCK:
        if (found := _KNOWN.get(key)) is None:
            found = _KNOWN[key] = Traces(_merging(forward) if role == "inner" else forward, limit)
        found.users += 1
        return found


def _entry(
    own: Forward, model: nn.Module, copies: str, cache: PositionCache, kwargs: dict[str, Any], outputs: Any
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


def _merging(forward: Forward) -> Forward:
    """A decoder's forward that writes the features where they stand already in its embeddings: a merge in the graph."""

    @functools.wraps(forward)
    def merging(decoder: nn.Module, mm_encoder_outputs: Mapping[str, Any], **kwargs: Any) -> Any:
        for one in mm_encoder_outputs.values():
            if one.mask is not None:
                x = kwargs["inputs_embeds"].masked_scatter(one.mask[..., None], one.merged)
                kwargs = kwargs | {"inputs_embeds": x}
        return forward(decoder, **kwargs)

    return merging
