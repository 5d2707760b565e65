"""Spare room of a cache's layers: no copy of what is already there, and nothing written that somebody sees."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

from tests.caches import HEADS, MODES, D, allocated, forward, prefilled, tokens
from tests.small import places
from vlmrewrite import ops
from vlmrewrite.kvcache import layer as layer_module
from vlmrewrite.kvcache.buffer import LEAST, SHARE, Buffer
from vlmrewrite.kvcache.cache import PositionCache
from vlmrewrite.lower.decode_step import DecodeStep


@pytest.fixture(autouse=True)
def buffers_for_a_half(monkeypatch):
    monkeypatch.setattr(layer_module, "SMALL", 0)  # of which the tests here are, and not for a half alone


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


@pytest.mark.parametrize("mode", ["no_grad", "inference"])
def test_few_tokens_are_copied_at_each_append_and_many_are_not(mode, monkeypatch):
    monkeypatch.setattr(layer_module, "SMALL", 20 * 2 * HEADS * D * 4)
    with MODES[mode]():
        cache, plain = prefilled(18, 1), prefilled(18, 1)
        for i in range(6):
            before = places(cache)
            forward(cache, 1, i, 1)
            assert (places(cache) == before) == (i > 2)  # 18 and 19 are few; the buffer is made as the 21st token comes
            assert (allocated(cache) == cache.kv_bytes()) == (i < 2)
        monkeypatch.setattr(layer_module, "SMALL", 0)
        for i in range(6):
            forward(plain, 1, i, 1)
    assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)
    assert torch.equal(cache.layers[0].values, plain.layers[0].values)


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
    made = DecodeStep.of(gm, True, True, False, "reference", torch.device("cpu"), "eager")
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


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy], ids=["pickle", "deepcopy"])
@pytest.mark.parametrize("modes", [("no_grad", "no_grad"), ("inference", "no_grad"), ("no_grad", "inference")])
def test_a_copy_goes_on_in_memory_of_its_own(copied, modes):
    with MODES[modes[0]]():
        cache = prefilled(5)
        forward(cache, 1, 1)
        other = copied(cache)
    with MODES[modes[1]]():
        for one in (other, cache):
            for i in range(3):
                forward(one, 1, 2 + i)
    for a, b in zip(cache.layers, other.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    assert not set(places(cache)) & set(places(other))


@torch.no_grad()
def test_rows_that_are_not_the_caches_change_nothing():
    cache = prefilled(5, 1)
    cache.begin()
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        cache.update(*tokens(3, 1, 9), 0)
    assert cache.layers[0].positions.shape[1] == cache.layers[0].keys.shape[2] == 5
