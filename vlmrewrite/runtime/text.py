"""Calls without an image: nothing is dropped in them, and what the cache holds is what each layer sees."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmrewrite import capture, hf
from vlmrewrite.capture import Graph, captures_of
from vlmrewrite.errors import CaptureError
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.lower import DecodeStep
from vlmrewrite.ops import Backend, Kernels, Running, choose, replaced, resolve


class TextCalls:
    """Those of one recipe.

    Attributes:
        calls: how many there were, by thread, so that none waits for another, and whether a cache was there.
        compiled: how many of them a compiler ran, by thread.
        why: why a compiler runs none, or none of a fixed length, where it was to; by what is done instead, and the
            names of the arguments of the calls that it holds for.
    """

    def __init__(self, backend: Backend, kernels: Kernels) -> None:
        self._backend, self._kernels = backend, kernels
        self.calls: Counter[tuple[int, bool]] = Counter()
        self.compiled: Counter[int] = Counter()
        self.why: dict[tuple[str, frozenset[str]], str] = {}

    def __call__(self, model: nn.Module, cache: PositionCache | None, kwargs: dict[str, Any]) -> Any:
        """Run a forward, of a model or its decoder, with the arguments of that but for the cache."""
        device, failed = hf.device_of(model), None
        self.calls[threading.get_ident(), cache is not None and cache.get_seq_length() > 0] += 1
        if cache is not None:
            kwargs = hf.without_full_mask(kwargs)
            backend, form = resolve(self._backend, device), frozenset(k for k, x in kwargs.items() if x is not None)
            if backend != "eager" and (_EAGER, form) not in self.why and not (hf.lends(model) or cache.stores):
                try:
                    out = self._compiled(model, cache, kwargs, form, device, backend)
                except CaptureError as e:
                    if self._backend != "auto":
                        raise
                    failed = str(e)
                else:
                    self.compiled[threading.get_ident()] += 1
                    return out
        kernels = self._kernels if choose(self._kernels, device).kernel == "triton" else None
        with capture.running(cache, kernels):
            forward = type(model).forward
            if kwargs.get("attention_mask") is not None:  # which some decoders would cut as another form of it
                kwargs = hf.keeping_all_tokens(kwargs)
            out = forward(model, past_key_values=cache, use_cache=cache is not None, return_dict=True, **kwargs)
        if failed is not None:
            self._tell(model, _EAGER, form, failed)
        return out

    def _compiled(
        self,
        model: nn.Module,
        cache: PositionCache,
        kwargs: dict[str, Any],
        form: frozenset[str],
        device: torch.device,
        how: Running,
    ) -> Any:
        """The same behind a compiler, which is given all layers' keys at once."""
        given = kwargs["inputs_embeds" if kwargs.get("input_ids") is None else "input_ids"]
        mask, more, cache.steady = kwargs.get("attention_mask"), int(given.shape[1]), True
        bits = mask is None or (isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] > cache.get_seq_length())
        try:
            with cache.in_full(more if bits and (_GROWING, form) not in self.why else 0) as full:
                longer = F.pad(mask, (0, cache.length - mask.shape[1]), value=1) if full and mask is not None else mask
                return self._step(model, cache, kwargs | {"attention_mask": longer}, more, full, device, how)
        except CaptureError as e:
            if not full:
                raise
            failed = str(e)
        out = self._step(model, cache, kwargs, more, False, device, how)
        self._tell(model, _GROWING, form, failed)
        return out

    def _step(
        self,
        model: nn.Module,
        cache: PositionCache,
        kwargs: dict[str, Any],
        more: int,
        full: bool,
        device: torch.device,
        how: Running,
    ) -> Any:
        reserved = not full and cache.reserve(more)
        plain = not full and kwargs.get("attention_mask") is None and not cache.holes()
        made = plain, reserved, full, self._kernels, device, how

        def runner(graph: Graph, inputs: Sequence[Any]) -> Any:
            step = graph.once(("decode", *made, replaced()), lambda: DecodeStep.of(graph.gm, *made))
            return step.run(cache, inputs, more)

        if not (full or reserved):
            cache.contiguous()
        return captures_of(model).text(runner, model, cache, kwargs, None)

    def _tell(self, model: nn.Module, what: str, form: frozenset[str], why: str) -> None:
        """Say it, once; calls of this form are so from here on, since the other way did what this one could not."""
        told = f"decode steps of {type(model).__name__} {what}: {why}"
        if told not in self.why.values():
            warnings.warn(told, stacklevel=5)
        self.why[what, form] = told


_EAGER = "run without the compiler"
_GROWING = "are compiled for keys that grow, not for the length of the static cache"
