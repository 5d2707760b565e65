"""The cache against one that concatenates: the same contents after anything."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from tests.caches import MODES, allocated, forward, tokens
from vlmrewrite.kvcache import layer as layer_module
from vlmrewrite.kvcache.cache import PositionCache
from vlmrewrite.kvcache.layer import PositionLayer


@pytest.fixture(autouse=True)
def buffers_for_a_half(monkeypatch):
    monkeypatch.setattr(layer_module, "SMALL", 0)  # of which the tests here are, and not for a half alone


class Plain:
    """What a layer should hold: [keys, values, positions], concatenated, and the logical length."""

    def __init__(self, held: list[torch.Tensor], seen: int) -> None:
        self.held, self.seen = held, seen

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        pos = torch.arange(self.seen, self.seen + k.shape[2])[None].expand(k.shape[0], -1)
        self.held = [torch.cat([a, b], -2 + (a.dim() == 2)) for a, b in zip(self.held, (k, v, pos), strict=True)]
        self.seen += k.shape[2]

    def crop(self, n: int) -> None:
        self.seen = max(0, self.seen - n)
        keys, values, pos = self.held
        pos = pos.masked_fill(pos >= self.seen, -1)
        used = (pos >= 0).any(0).nonzero()
        m = int(used[-1]) + 1 if len(used) else 0
        self.held = [keys[:, :, :m], values[:, :, :m], pos[:, :m]]

    def rows(self, index: object) -> None:
        self.held = [x[index] for x in self.held]


class Caches(RuleBasedStateMachine):
    """Caches, copies of caches, and tensors that somebody kept of them."""

    caches = Bundle("caches")

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[PositionCache, list[Plain]]] = []
        self.kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.seed = 0

    def new(self, cache: PositionCache, plain: list[Plain]) -> tuple[PositionCache, list[Plain]]:
        self.all.append((cache, plain))
        return cache, plain

    @initialize(
        target=caches,
        n=st.integers(2, 9),
        rows=st.integers(1, 3),
        mode=st.sampled_from(sorted(MODES)),
        small=st.sampled_from([0, 500, 1 << 17]),
    )
    def prefill(self, n, rows, mode, small):
        """Two layers that hold all tokens, and one of fewer, with empty slots, as graphs leave them."""
        layer_module.SMALL = small
        cache, plain = PositionCache(), []
        everything = torch.arange(n).repeat(rows, 1)
        fewer = torch.where(torch.arange(rows)[:, None] % 2 == 1, -1, everything)[:, : n // 2]
        fewer[0, 0] = 0
        with MODES[mode]():
            for i, pos in enumerate((everything, everything, fewer)):
                k, v = tokens(rows, pos.shape[1], i)
                layer = PositionLayer()
                layer.keys, layer.values, layer.positions, layer.seen = k.clone(), v.clone(), pos, n
                layer.holes, layer.is_initialized = bool((pos < 0).any()), True
                cache.layers.append(layer)
                plain.append(Plain([k, v, pos], n))
        return self.new(cache, plain)

    @rule(one=caches, t=st.integers(1, 40), mode=st.sampled_from(sorted(MODES)))
    def append(self, one, t, mode):
        cache, plain = one
        self.seed += 10
        with MODES[mode]():
            got = forward(cache, t, self.seed)
        for i, (layer, (keys, values)) in enumerate(zip(plain, got, strict=True)):
            layer.append(*tokens(len(layer.held[0]), t, self.seed + i))
            assert torch.equal(keys, layer.held[0])
            assert torch.equal(values, layer.held[1])
            assert cache.layer_of(keys) is cache.layers[i]

    @rule(one=caches, t=st.integers(1, 9))
    def append_in_a_graph(self, one, t):
        """As Dynamo does it when a captured graph has run."""
        cache, plain = one
        cache.contiguous()
        self.seed += 10
        for i, (layer, other) in enumerate(zip(cache.layers, plain, strict=True)):
            k, v = tokens(len(layer.keys), t, self.seed + i)
            other.append(k, v)
            layer.keys, layer.values, layer.positions = [x.clone() for x in other.held]
            layer.seen += t
        cache.layers[1].positions = cache.layers[0].positions

    @rule(one=caches, t=st.integers(1, 90))
    def reserve(self, one, t):
        with torch.no_grad():
            assert one[0].reserve(t)
        assert all(layer.own().takes(t) for layer in one[0].layers)

    @rule(one=caches, n=st.integers(0, 12))
    def crop(self, one, n):
        cache, plain = one
        cache.crop(-n)
        for layer in plain if n else ():
            layer.crop(n)

    @rule(one=caches, t=st.integers(2, 9), data=st.data(), part=st.none() | st.booleans())
    def speculate(self, one, t, data, part):
        """As assisted decoding does, with somebody looking or not."""
        self.append(one, t, "no_grad")
        if part is not None:
            self.keep(one, part)
        self.crop(one, data.draw(st.integers(1, t)))
        self.append(one, 1, "no_grad")

    @rule(one=caches, data=st.data(), mode=st.sampled_from(sorted(MODES)))
    def reorder(self, one, data, mode):
        cache, plain = one
        rows = len(plain[0].held[0])
        index = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)))
        with MODES[mode]():
            cache.reorder_cache(index)
        for layer in plain:
            layer.rows(index)

    @rule(one=caches, data=st.data(), mask=st.booleans())
    def select(self, one, data, mask):
        cache, plain = one
        index = torch.tensor(
            data.draw(st.lists(st.integers(0, len(plain[0].held[0]) - 1), min_size=1, max_size=3, unique=True))
        )
        given = torch.zeros(len(plain[0].held[0]), dtype=torch.bool).index_fill(0, index, True) if mask else index
        with torch.no_grad():
            cache.batch_select_indices(given)
        for layer in plain:
            layer.rows(given)

    @rule(one=caches)
    def repeat(self, one):
        cache, plain = one
        if len(plain[0].held[0]) <= 3:
            with torch.no_grad():
                cache.batch_repeat_interleave(2)
            for layer in plain:
                layer.held = [x.repeat_interleave(2, 0) for x in layer.held]

    @rule(target=caches, one=caches, how=st.sampled_from(["deepcopy", "pickle", "torch.save"]))
    def copied(self, one, how):
        cache, plain = one
        if len(self.all) > 2:
            return multiple()
        if how == "deepcopy":
            cache = copy.deepcopy(cache)
        elif how == "pickle":
            cache = pickle.loads(pickle.dumps(cache))
        else:
            file = io.BytesIO()
            torch.save(cache, file)
            cache = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        return self.new(cache, copy.deepcopy(plain))

    @rule(target=caches, one=caches)
    def layers_copied(self, one):
        """New layer objects around the same tensors, which part."""
        cache, plain = one
        if len(self.all) > 2:
            return multiple()
        self.append(one, 1, "no_grad")
        other = PositionCache()
        other.layers = [copy.copy(layer) for layer in cache.layers]
        new = self.new(other, copy.deepcopy(plain))
        self.append(one, 2, "no_grad")
        self.append(new, 1, "no_grad")
        return new

    @rule(one=consumes(caches))
    def forget(self, one):
        if len(self.all) > 1:
            self.all.remove(one)

    @rule(one=caches, part=st.booleans())
    def keep(self, one, part):
        for layer in one[0].layers:
            x = layer.keys[:1, :, 1:] if part else layer.values
            self.kept.append((x, x.clone()))

    @rule()
    def drop(self):
        self.kept.clear()

    @invariant()
    def holds_what_it_should(self):
        for cache, plain in self.all:
            for layer, other in zip(cache.layers, plain, strict=True):
                assert all(map(torch.equal, (layer.keys, layer.values, layer.positions), other.held))
                assert layer.seen == layer.get_seq_length() == other.seen
                assert layer.holes or bool((layer.positions >= 0).all())
            assert cache.kv_lengths() == [p.held[0].shape[2] for p in plain]
            assert cache.kv_bytes() == sum(x.numel() * 4 for p in plain for x in p.held[:2]) <= allocated(cache)
            assert cache.layers[0].positions is cache.layers[1].positions

    @invariant()
    def what_was_kept_stays(self):
        assert all(torch.equal(x, before) for x, before in self.kept)


Caches.TestCase.settings = settings(max_examples=8 * settings.default.max_examples, stateful_step_count=30)
TestCaches = Caches.TestCase
