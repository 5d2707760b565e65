"""Caches of a few layers, with what nobody has computed in them; and what compiled steps are given of a cache."""

from __future__ import annotations

import torch

from vlmrewrite.kvcache.cache import PositionCache

HEADS, D, DV = 2, 4, 3
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "grad": torch.enable_grad}


def tokens(rows: int, t: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, HEADS, t, D, generator=g), torch.randn(rows, HEADS, t, DV, generator=g)


def forward(cache: PositionCache, t: int, seed: int, layers: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One eager forward's updates."""
    rows = cache.layers[0].keys.shape[0] if cache.layers else 2
    cache.begin()
    out = [cache.update(*tokens(rows, t, seed + i), i) for i in range(layers)]
    cache.end()
    return out


def allocated(cache: PositionCache) -> int:
    """Bytes of memory of keys and values, with the spare room."""
    holders = [layer.own() or layer for layer in cache.layers]
    return sum(x.nbytes for holder in holders for x in (holder.keys, holder.values) if x is not None)


def prefilled(n: int, layers: int = 3) -> PositionCache:
    cache = PositionCache()
    forward(cache, n, 0, layers)
    return cache


GIVEN: list = []
"""For all tests: a step that was made in one is used in the next."""


def behind(gm, _):
    def run(*inputs):
        own = [x for x in inputs if not isinstance(x, torch.nn.Parameter)]
        GIVEN.append([(x.shape, x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in own])
        return gm(*inputs)

    return run
