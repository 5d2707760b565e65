"""Capture: the two registered functions, and Dynamo's front end around a model's own forward.

``attention_forward`` and ``mask_forward`` are registered with transformers under one name. While tracing, they leave
one ``vlm::attention`` node per decoder layer; run eagerly, they compute the same attention from the positions that the
cache carries. Decoding needs nothing else: the cache already holds what each layer may see.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._dynamo
import torch._dynamo.config
import torch.fx
import torch.fx.experimental._config
from torch import Tensor
from torch._C._dynamo.eval_frame import reset_code
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import AttentionInterface

from vlmrewrite import attend, dialect
from vlmrewrite.cache import PositionCache
from vlmrewrite.choice import Kernels, unfit

IMPLEMENTATION = "vlmrewrite"
LIMIT = 24
"""Graphs of one model before giving up: with or without gradient, padding, a past, one row or more, one logit or all
make different graphs, so that Dynamo's default of 8 is soon used up."""

_OURS = ("past_key_values", "use_cache", "mm_encoder_outputs", "return_dict")
_UNSUPPORTED = ("s_aux", "position_bias", "output_attentions")
_running = threading.local()


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers' ``AttentionInterface``: q [B, H, t, D], k and v [B, Hk, m, D]."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise NotImplementedError(f"vlmrewrite's attention does not take {name}={kwargs[name]!r}")
    if not getattr(module, "is_causal", True) or kwargs.get("is_causal") is False:
        raise NotImplementedError(
            f"{type(module).__name__} asks for bidirectional attention; expected a causal decoder"
        )
    if torch.compiler.is_compiling():
        plain = attention_mask is None
        out = torch.ops.vlm.attention.default(
            query, key, value, attention_mask, None, None, scaling, plain, softcap, float(dropout)
        )
        return out, None
    cache: PositionCache | None = getattr(_running, "cache", None)
    layer = None if cache is None else cache.layer_of(key)
    if cache is None or layer is None:
        if query.shape[2] != key.shape[2]:
            raise RuntimeError(
                f"{key.shape[2]} keys for {query.shape[2]} queries that did not come from vlmrewrite's cache: this"
                " model transforms its keys after the cache, which is not supported"
            )
        plain = attention_mask is None
        return dialect.attention(query, key, value, attention_mask, None, None, scaling, plain, softcap, dropout), None
    kernels: Kernels | None = _running.kernels
    if kernels is not None and unfit(query, value, dropout, kernels, f"layer {module.layer_idx}") is None:
        look = attend.seen if softcap is None else attend.seen_masked
        what = cache.seen_by(layer, query, attention_mask, look)
        return attend.attend(query, key, value, what, scaling, softcap), None
    seen = cache.seen_by(layer, query, attention_mask, dialect.visible)
    return dialect.attend(query, key, value, seen, scaling, softcap, dropout), None


def mask_forward(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mask function for transformers' ``AttentionMaskInterface``.

    Returns:
        for a plain causal mask, the padding bits [B, kv_length] (None if there is no padding); for every other
        pattern, bool [B, 1, q_length, kv_length] in logical positions.
    """
    if mask_function is causal_mask_function:
        looked_at = getattr(_running, "cache", None) is not None
        if attention_mask is None or looked_at or torch.compiler.is_compiling():
            return attention_mask
        return None if bool(attention_mask.all()) else attention_mask
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "use_vmap": False}
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )


def register() -> None:
    """Make the implementation known to transformers; idempotent."""
    AttentionInterface.register(IMPLEMENTATION, attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_forward)


@contextlib.contextmanager
def running(cache: PositionCache | None, kernels: Kernels | None = None) -> Iterator[None]:
    """While an uncaptured forward runs with ``cache``.

    Args:
        kernels: ``"triton"`` or ``"auto"``: its attention runs as kernels, where it can; otherwise as plain PyTorch.
    """
    before = getattr(_running, "cache", None), getattr(_running, "kernels", None)
    if cache is not None:
        cache.begin()
    _running.cache, _running.kernels = cache, kernels
    try:
        yield
    finally:
        _running.cache, _running.kernels = before
        if cache is not None:
            cache.end()


def decoder_configs(model: torch.nn.Module) -> list[Any]:
    """The distinct config objects that the text decoder's modules read their attention implementation from."""
    decoder = model.get_decoder()  # type: ignore[operator]
    found = {id(m.config): m.config for m in decoder.modules() if hasattr(m, "config")}
    text = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
    return list((found | {id(text): text}).values())


@contextlib.contextmanager
def attention_swapped(model: torch.nn.Module, name: str = IMPLEMENTATION) -> Iterator[None]:
    """Temporarily use another attention implementation in the text decoder only."""
    before = [(c, c._attn_implementation_internal) for c in decoder_configs(model)]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, value in before:
            config._attn_implementation_internal = value


class TracedCall:
    """A model's forward behind Dynamo: ``on_graph(gm)`` gets each new graph and returns the callable to run for it.

    Args:
        forward: the model's own.
        entry: :func:`with_images` or :func:`without_images`, called with ``forward`` and what a call is given.
        on_graph: held weakly if it is a method, as Dynamo never forgets a backend, nor what the backend holds.
    """

    def __init__(
        self, forward: Callable[..., Any], entry: Callable[..., Any], on_graph: Callable[..., Callable[..., Any]]
    ) -> None:
        self.graphs = 0
        self.seconds = 0.0
        me, told = weakref.ref(self), weakref.WeakMethod(on_graph) if inspect.ismethod(on_graph) else lambda: on_graph

        def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
            call, tell = me(), told()
            assert call is not None and tell is not None
            call.graphs += 1
            call.seconds += time.perf_counter() - call._begun
            return tell(gm)

        # A code object of its own: Dynamo counts recompiles per code object, and models must not share the limit.
        own = types.FunctionType(entry.__code__.replace(), entry.__globals__, f"vlmrewrite_{entry.__name__}")
        self._compiled = torch.compile(own, backend=backend, fullgraph=True, dynamic=True)
        # What Dynamo made of a code object keeps it alive, by way of the module's globals.
        weakref.finalize(self, reset_code, own.__code__).atexit = False
        self._code = own.__code__
        self._forward = forward
        self._begun = 0.0
        # The same names in every call: Dynamo cannot explain a recompile over a tensor that is no longer among them.
        self._absent = {
            name: None
            for name, p in inspect.signature(forward).parameters.items()
            if p.default is None and name not in _OURS
        }

    @property
    def limit(self) -> int:
        """How many graphs there may be; torch._dynamo.config.recompile_limit raises it."""
        return max(LIMIT, int(torch._dynamo.config.recompile_limit))

    def __call__(self, model: torch.nn.Module, cache: PositionCache, kwargs: dict[str, Any], *more: Any) -> Any:
        """Run (and trace if new) the forward; ``more`` is what the entry takes beside the forward's own arguments."""
        with tracing_options(), _set(torch._dynamo.config, recompile_limit=self.limit):
            self._begun = time.perf_counter()
            try:
                return self._compiled(self._forward, model, cache, self._absent | kwargs, *more)
            except _NotCompiled:
                reset_code(self._code)  # or Dynamo would never look at it again
                raise
            except torch._dynamo.exc.FailOnRecompileLimitHit as e:
                raise RuntimeError(
                    f"{self.graphs} graphs of this model were compiled and the limit is reached; raise"
                    " torch._dynamo.config.recompile_limit above it. The unrewritten model is not run in its place."
                ) from e
            except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError) as e:
                raise RuntimeError(
                    f"the forward of {type(model).__name__} could not be captured as one graph: {str(e)[:2000]}"
                ) from e


def with_images(
    forward: Callable[..., Any],
    model: torch.nn.Module,
    cache: PositionCache,
    kwargs: dict[str, Any],
    features: Tensor,
    as_list: bool,
) -> Any:
    """A forward whose images are encoded: features [F, C], or [I, N, C] if not ``as_list``."""
    _insist()
    image = BaseModelOutputWithPooling(pooler_output=[features] if as_list else features)  # type: ignore[arg-type]
    return forward(
        model, past_key_values=cache, use_cache=True, mm_encoder_outputs={"image": image}, return_dict=True, **kwargs
    )


def without_images(
    forward: Callable[..., Any], model: torch.nn.Module, cache: PositionCache, kwargs: dict[str, Any]
) -> Any:
    """A forward of text: a decode step, or a prompt without an image."""
    _insist()
    return forward(model, past_key_values=cache, use_cache=True, return_dict=True, **kwargs)


class _NotCompiled(RuntimeError):
    """Dynamo ran an entry as it is."""


def _insist() -> None:
    if not torch.compiler.is_compiling():
        raise _NotCompiled(
            "torch.compile does nothing here, and the rewritten graph is behind it: leave the TorchDispatchMode that is"
            " active (FlopCounterMode is one), torch.compiler.set_stance('force_eager'), or TORCH_COMPILE_DISABLE=1"
        )


@contextlib.contextmanager
def tracing_options() -> Iterator[None]:
    """Dynamo options of a capture: every axis a symbol of its own, Python floats as constants.

    What transformers checks of tensors (``torch_compilable_check``) is left out: the host has compared the number of
    tokens and features, and torch 2.11 cannot trace it.
    """
    with (
        _environment("TRANSFORMERS_DISABLE_TORCH_CHECK", "1"),
        _set(torch.fx.experimental._config, use_duck_shape=False),
        _set(torch._dynamo.config, specialize_float=True),
        _symbols_in_messages(),
    ):
        yield


@contextlib.contextmanager
def _set(config: Any, **options: Any) -> Iterator[None]:
    """What ``config.patch`` does, which makes a class at each call, and every decode step is one."""
    before = {name: getattr(config, name) for name in options}
    try:
        for name, value in options.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


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
