"""Dynamo's front end around a model's own forward: each way of calling it becomes one graph."""

from __future__ import annotations

import inspect
import re
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.fx
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmrewrite.compat import at_graph_limit, captured, forget_code, global_hooks, graph_limit, hooks_of, untraceable
from vlmrewrite.errors import CaptureError
from vlmrewrite.kvcache import PositionCache

LIMIT = 24
"""Graphs of one model before giving up: with or without gradient, padding, a past, one row or more, one logit or all
make different graphs, so that Dynamo's default of 8 is soon used up."""

_OURS = ("past_key_values", "use_cache", "mm_encoder_outputs", "return_dict")


class CapturedForward:
    """A model's forward behind Dynamo: ``on_graph(gm)`` gets each new graph and returns the callable to run for it.

    Args:
        forward: the model's own.
        entry: :func:`with_images` or :func:`without_images`, called with ``forward`` and what a call is given.
        on_graph: a method, held weakly, as Dynamo never forgets a backend, nor what the backend holds.
    """

    def __init__(
        self, forward: Callable[..., Any], entry: Callable[..., Any], on_graph: Callable[..., Callable[..., Any]]
    ) -> None:
        self.graphs = 0
        self.seconds = 0.0
        me, told = weakref.ref(self), weakref.WeakMethod(on_graph)

        def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            call, tell = me(), told()
            assert call is not None and tell is not None
            call.graphs += 1
            return tell(gm)

        def traced(seconds: float) -> None:
            if (call := me()) is not None:
                call.seconds += seconds

        # A code object of its own: Dynamo counts recompiles per code object, and models must not share the limit.
        own = types.FunctionType(entry.__code__.replace(), entry.__globals__, f"vlmrewrite_{entry.__name__}")
        self._compiled = captured(own, backend, _limit, traced)
        # What Dynamo made of a code object keeps it alive, by way of the module's globals.
        weakref.finalize(self, forget_code, own.__code__).atexit = False
        self._code = own.__code__
        self._forward = forward
        # The same names in every call: Dynamo cannot explain a recompile over a tensor that is no longer among them.
        self._absent = {
            name: None
            for name, p in inspect.signature(forward).parameters.items()
            if p.default is None and name not in _OURS
        }

    @property
    def limit(self) -> int:
        """How many graphs there may be; torch._dynamo.config.recompile_limit raises it."""
        return _limit()

    def forget(self) -> None:
        """Drop what was captured."""
        forget_code(self._code)

    def __call__(self, model: torch.nn.Module, cache: PositionCache, kwargs: dict[str, Any], *more: Any) -> Any:
        """Run (and trace if new) the forward; ``more`` is what the entry takes beside the forward's own arguments."""
        try:
            return self._compiled(self._forward, model, cache, self._absent | kwargs, *more)
        except NotCapturedError:
            self.forget()  # or Dynamo would never look at it again
            raise
        except at_graph_limit() as e:
            raise RuntimeError(
                f"{self.graphs} graphs of this model were compiled and the limit is reached; raise"
                f" torch._dynamo.config.recompile_limit above it{_hooked(model)}. The unrewritten model is not run in"
                " its place."
            ) from e
        except untraceable() as e:
            what = f"the forward of {type(model).__name__} could not be captured as one graph{_hooked(model)}"
            raise CaptureError(f"{what}: {str(e)[:2000]}", f"{what}: {_reason(str(e))}") from e


def _reason(text: str) -> str:
    """What Dynamo says first, its details, and the innermost source line, of the many lines in its message."""
    lines = [line.strip() for line in text.splitlines()]
    details = [line.partition(": ")[2] for line in lines if line.startswith("Developer debug context: ")]
    places = re.findall(r'File "(?:[^"]*/)?([^"/]+)", line (\d+)', text)
    at = [f"({places[-1][0]}, line {places[-1][1]})"] if places else []
    return " ".join([*lines[:1], *details[:1], *at])


def _limit() -> int:
    return max(LIMIT, graph_limit())


def _hooked(model: torch.nn.Module) -> str:
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


def with_images(
    forward: Callable[..., Any],
    model: torch.nn.Module,
    cache: PositionCache,
    kwargs: dict[str, Any],
    features: Tensor,
    as_list: bool,
) -> Any:
    """A forward whose images are encoded: features [F, C], or [I, N, C] if not ``as_list``."""
    image = BaseModelOutputWithPooling(pooler_output=[features] if as_list else features)  # type: ignore[arg-type]
    return without_images(forward, model, cache, kwargs | {"mm_encoder_outputs": {"image": image}})


def without_images(
    forward: Callable[..., Any], model: torch.nn.Module, cache: PositionCache, kwargs: dict[str, Any]
) -> Any:
    """A forward of text: a decode step, or a prompt without an image."""
    global_hooks()  # read, so that Dynamo guards on it
    if not torch.compiler.is_dynamo_compiling():
        raise NotCapturedError(
            "torch.compile does nothing here, and the rewritten graph is behind it: leave the TorchDispatchMode that is"
            " active (FlopCounterMode is one), torch.compiler.set_stance('force_eager'), or TORCH_COMPILE_DISABLE=1"
        )
    return forward(model, past_key_values=cache, use_cache=True, return_dict=True, **kwargs)


class NotCapturedError(RuntimeError):
    """Something else ran in place of a captured graph."""
