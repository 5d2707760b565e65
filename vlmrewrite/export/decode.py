"""A step behind a prompt as a module that can be exported: a token and what layers keep in, logits and the same out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmrewrite import capture
from vlmrewrite.export.prefill import PAST, Called, Past
from vlmrewrite.kvcache import PositionCache, PositionLayer


class _GrownLayer(PositionLayer):
    """A layer that holds longer tensors after each step, and never writes into those that it was given."""

    def __init__(self, keys: Tensor, values: Tensor, positions: Tensor, seen: Any) -> None:
        super().__init__()
        self.keys, self.values, self.positions = keys, values, positions
        self.seen, self.holes, self.is_initialized = seen, True, True

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys, self.values = torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)
        return self.keys, self.values


class Decode(Called):
    """A model's own forward on what its layers keep.

    Args:
        model: with vlmrewrite's attention in place while it is exported.
        positions: whether positions are made from the mask.
        names: the arguments that it takes.
    """

    def __init__(self, model: nn.Module, positions: bool, names: Sequence[str]) -> None:
        super().__init__(names)
        self.model, self._positions = model, positions

    def run(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Logits [B, t, V] and what each layer keeps; see :func:`vlmrewrite.export`."""
        past: Past = kwargs[PAST]
        kwargs = {name: x for name, x in kwargs.items() if name != PAST}
        mask, new = kwargs["attention_mask"], kwargs["input_ids"].shape[1]
        cache, seen = PositionCache(), mask.shape[1] - new
        cache.layers = [_GrownLayer(*layer, seen) for layer in past]
        if self._positions:
            kwargs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]
        with capture.running(cache):
            own = type(self.model).forward
            out = own(self.model, past_key_values=cache, use_cache=True, return_dict=True, **kwargs)
        kept = [(layer.keys, layer.values, layer.positions) for layer in cache.layers]
        return {"logits": out.logits, PAST: [tuple(x.contiguous() for x in one) for one in kept]}
