"""The cache against one that concatenates: the same contents after anything, and no copy of what is already there."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from torch.nn.functional import scaled_dot_product_attention as attend

from tests.small import places
from vlmrewrite import ops
from vlmrewrite.kvcache.cache import PositionCache
from vlmrewrite.kvcache.layer import LEAST, SHARE, Buffer, PositionLayer
from vlmrewrite.lower.decode_step import DecodeStep

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

    @initialize(target=caches, n=st.integers(2, 9), rows=st.integers(1, 3), mode=st.sampled_from(sorted(MODES)))
    def prefill(self, n, rows, mode):
        """Two layers that hold all tokens, and one of fewer, with empty slots, as graphs leave them."""
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


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_what_is_there_moves_only_when_the_room_is_used_up(mode):
    with MODES[mode]():
        cache = prefilled(1000)
        held, moves, before = places(cache), 0, 0
        for i in range(600):
            forward(cache, 1, i)
            now = places(cache)
            if now != held:
                assert i == 0 or cache.kv_lengths()[0] in (before, before + 1)
                before = cache.layers[0].buffer.keys.shape[2]
                moves += 1
            held = now
            spare = allocated(cache) - cache.kv_bytes()
            assert spare <= cache.kv_bytes() / SHARE + 1
    assert moves == 4  # to capacities of 1126, 1266, 1424 and 1602


def test_a_short_cache_has_room_for_some_tokens():
    with torch.no_grad():
        cache = prefilled(3)
        assert allocated(cache) == cache.kv_bytes()
        forward(cache, 1, 1)
        held = places(cache)
        for i in range(LEAST - 1):
            forward(cache, 1, i)
            assert places(cache) == held
        forward(cache, 1, 1)
        assert places(cache) != held


def test_memory_that_came_from_elsewhere_is_not_written_to():
    k, v = tokens(1, 70, 0)
    ours = k.expand(2, -1, -1, -1)[:, :, :5], v.expand(2, -1, -1, -1)[:, :, :5]
    before = k.clone(), v.clone()
    cache = PositionCache()
    with torch.no_grad():
        cache.begin()
        cache.update(*ours, 0)
        cache.update(*tokens(2, 3, 1), 0)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])


def test_a_beam_search_copies_once_a_step():
    with torch.no_grad():
        cache = prefilled(50)
        for i in range(4):
            cache.reorder_cache(torch.tensor([1, i % 2]))
            held = places(cache)
            forward(cache, 1, i)
            assert places(cache) == held


@pytest.mark.parametrize("kept", ["nothing", "all", "a row", "by autograd"])
def test_after_a_crop_nothing_is_written_over_that_somebody_sees(kept):
    with torch.no_grad():
        cache = prefilled(20)
        forward(cache, 6, 1)
    held = places(cache)
    seen = [layer.keys for layer in cache.layers] if kept == "all" else [layer.keys[0] for layer in cache.layers]
    seen = [] if kept in ("nothing", "by autograd") else seen
    before = [x.clone() for x in seen]
    if kept == "by autograd":
        q = torch.randn(2, HEADS, 1, D, requires_grad=True)
        out = [attend(q, layer.keys, layer.values) for layer in cache.layers]
        again = [attend(q, layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    with torch.no_grad():
        cache.crop(-4)
        assert places(cache) == held
        forward(cache, 2, 2)
    assert (places(cache) == held) == (kept == "nothing")
    assert all(map(torch.equal, seen, before))
    if kept == "by autograd":
        got, expected = (torch.autograd.grad(sum(x.sum() for x in y), q)[0] for y in (out, again))
        assert torch.equal(got, expected)


def test_an_append_is_no_change_of_what_autograd_saved():
    with torch.no_grad():
        cache = prefilled(20)
        forward(cache, 1, 1)
    q = torch.randn(2, HEADS, 1, D, requires_grad=True)
    out, held = attend(q, cache.layers[0].keys, cache.layers[0].values), places(cache)
    with torch.no_grad():
        forward(cache, 1, 2)
    assert places(cache) == held
    out.sum().backward()
    assert q.grad.isfinite().all()


def test_gradients_of_what_was_appended():
    k, v = (x.requires_grad_() for x in tokens(2, 3, 5))
    with torch.no_grad():
        cache = prefilled(20, layers=1)
        forward(cache, 1, 1, layers=1)
    before = cache.layers[0].keys, cache.layers[0].values
    cache.begin()
    keys, values = cache.update(k, v, 0)
    with torch.no_grad():
        forward(cache, 2, 2, layers=1)
    q = torch.randn(2, HEADS, 1, D)
    out = attend(q, keys, values), attend(q, torch.cat([before[0], k], 2), torch.cat([before[1], v], 2))
    got, expected = (torch.autograd.grad(x.sum(), (k, v)) for x in out)
    assert all(map(torch.equal, got, expected))


def test_layers_around_the_same_tensors_part():
    with torch.no_grad():
        one = prefilled(20)
        forward(one, 1, 1)
        other = PositionCache()
        other.layers = [copy.copy(layer) for layer in one.layers]
        before = one.layers[0].keys.clone()
        held = places(one)
        forward(one, 2, 2)
        forward(other, 3, 3)
        assert places(one) == held
        assert not set(places(other)) & set(held)
        for cache, t, seed in ((one, 2, 2), (other, 3, 3)):
            assert torch.equal(cache.layers[0].keys, torch.cat([before, tokens(2, t, seed)[0]], 2))


def test_other_dtypes_and_other_rows_do_as_concatenation_does():
    with torch.no_grad():
        cache = prefilled(5, layers=1)
        forward(cache, 1, 1, layers=1)
        cache.begin()
        k, v = (x.double() for x in tokens(2, 1, 3))
        keys, values = cache.update(k, v, 0)
        assert keys.dtype == values.dtype == torch.float64
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            cache.update(*(x[:1] for x in (k, v)), 0)


def test_in_and_out_of_inference_mode():
    with torch.inference_mode():
        cache = prefilled(5)
        forward(cache, 1, 1)
    held = places(cache)
    assert not cache.layers[0].keys.is_inference()
    for mode in ("no_grad", "inference", "no_grad"):
        with MODES[mode]():
            forward(cache, 1, 1)
        assert places(cache) == held
    q = torch.randn(2, HEADS, 1, D, requires_grad=True)
    attend(q, cache.layers[0].keys, cache.layers[0].values).sum().backward()
    assert q.grad.isfinite().all()


def test_a_reset_frees_the_room():
    with torch.no_grad():
        cache = prefilled(5)
        forward(cache, 1, 1)
    cache.reset()
    assert all(layer.buffer is None for layer in cache.layers)
    assert cache.kv_lengths() == [0, 0, 0]
    assert allocated(cache) == 0


def test_what_a_graph_reads_of_a_cache_besides_is_not_exchanged():
    graph = torch.fx.Graph()
    *old, k, v, pos = (graph.placeholder(name) for name in ("keys", "values", "positions", "k", "v", "pos"))
    grown = graph.call_function(torch.ops.vlm.kv_append.default, (*old, k, v, pos))
    parts = [graph.call_function(lambda x, i: x[i], (grown, i)) for i in range(3)]
    total = graph.call_function(torch.sum, (old[0],))
    graph.output((*parts, total))
    gm = torch.fx.GraphModule({}, graph)
    made = DecodeStep.of(gm, True, True, "reference", torch.device("cpu"), "eager")
    assert not made.writes
    with torch.no_grad():
        cache = prefilled(5, layers=1)
        cache.reserve(2)
        layer = cache.layers[0]
        given = (layer.keys, layer.values, layer.positions, *tokens(2, 2, 9), torch.full((2, 2), 5))
        out = made.run(cache, given, 2)
    expected = ops.kv_append(*given)
    assert all(map(torch.equal, out[:3], expected))
    assert layer.buffer is None


def test_a_room_keeps_its_tensors_contiguous_and_larger_than_what_is_shown():
    with torch.no_grad():
        buffer = Buffer(*tokens(2, 7, 0), more=3)
    assert buffer.keys.is_contiguous()
    assert buffer.keys.shape == (2, HEADS, 10 + LEAST, D)
    assert buffer.takes(2 + LEAST)
    assert not buffer.takes(3 + LEAST)
    assert buffer.shown[0]._base is None  # or Dynamo would guard the capacity too
