"""Caches whose keys and values are on the CPU between the turns of their layers: who moves what, and when."""

from __future__ import annotations

import copy

import torch
from transformers.cache_utils import DynamicLayer

from tests.caches import DV, HEADS, D
from tests.unit.test_cache_stores import DEPTH, Beside
from vlmrewrite.compat import fake_mode
from vlmrewrite.kvcache.cache import PositionCache


class Away(DynamicLayer):
    """Taken away, there is nothing to be read."""

    moves: list[str] = []  # noqa: RUF012
    kept = None

    def offload(self):
        self.moves.append("away")
        self.kept, self.keys, self.values = (self.keys, self.values), None, None

    def prefetch(self):
        if self.kept is not None:
            self.moves.append("back")
            (self.keys, self.values), self.kept = self.kept, None


@torch.no_grad()
def test_keys_are_away_between_the_turns_of_their_layer():
    it = Beside(DynamicLayer)
    it.cache = PositionCache(stores=[Away()])
    it.cache.offloading, it.cache.prefetch_stream = True, torch.Stream()
    Away.moves.clear()
    it.graph(9, [9, 4, 5])
    assert Away.moves == ["away"] * DEPTH
    for _ in range(2):
        Away.moves.clear()
        it.step(1)
        assert Away.moves == ["back", "away"] * DEPTH
    Away.moves.clear()
    it.graph(3, [3, 3, 1])
    assert Away.moves == ["back"] * DEPTH + ["back", "away"] * DEPTH  # a look by a copy, and the layers' own turn
    copied = copy.deepcopy(it)
    for one in (it, copied):
        one.step(2)
        for layer, own in zip(one.cache.layers, one.own, strict=True):
            assert layer.store.keys is None
            assert all(map(torch.equal, layer.store.kept, (own.keys, own.values)))


class Stream:
    """Stands for a GPU's, and notes who waits for whom."""

    device = torch.device("cuda")

    def __init__(self, name, notes):
        self.name, self.notes = name, notes

    def wait_stream(self, other):
        self.notes.append(f"{self.name} waits for {other.name}")

    def __enter__(self):
        self.notes.append("side")

    def __exit__(self, *_):
        self.notes.append("main")


@torch.no_grad()
def test_on_a_gpu_the_next_layers_keys_come_while_one_computes(monkeypatch):
    """Of tensors without numbers, which know their device, and of streams that note what they are told."""
    notes = []
    main, side = Stream("main", notes), Stream("side", notes)
    for name in ("default_stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: main)

    def where():
        return [(layer.store.keys.device.type, layer.store.values.device.type) for layer in cache.layers]

    there, away = ("cuda", "cuda"), ("cpu", "cpu")
    cache = PositionCache(stores=[DynamicLayer()])
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, False, side
    with fake_mode():
        made = [torch.empty(2, HEADS, 5, d, device="cuda") for d in (D, DV)]
        with cache.opened():
            for i in range(DEPTH):
                layer = cache.layer(i)
                layer.keys, layer.values = made
                layer.positions, layer.seen = torch.empty(2, 5, dtype=torch.long, device="cuda"), 5
        assert where() == [away] * DEPTH
        for _ in range(2):
            cache.begin()
            for i in range(DEPTH):
                notes.clear()
                keys, values = cache.update(*(x.narrow(2, 0, 1) for x in made), i)
                assert keys.device.type == values.device.type == "cuda"
                assert where() == [there if j == (i + 1) % DEPTH else away for j in range(DEPTH)]
                assert notes == ["main waits for side", "side waits for main", "side", "main"]
            notes.clear()
            cache.end()
            assert notes == ["main waits for side"]
        with cache.opened():
            assert all(layer.keys.device.type == layer.values.device.type == "cuda" for layer in cache.layers)
        cache.reorder_cache(torch.zeros(2, dtype=torch.long, device="cuda"))
        assert cache.kv_lengths() == [7] * DEPTH
