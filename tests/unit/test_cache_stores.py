"""Layers whose keys and values transformers' own layers keep: the same contents as theirs, whatever happens."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.cache_utils import DynamicLayer, Fp8QuantizedLayer, QuantizedLayer

from tests.caches import DV, HEADS, D, tokens
from vlmrewrite.compat import tree_leaves
from vlmrewrite.kvcache.cache import PositionCache
from vlmrewrite.kvcache.layer import PositionLayer
from vlmrewrite.kvcache.stored import StoredLayer

DEPTH = 3


class InGroups(QuantizedLayer):
    """transformers' layer with a window in full precision, over a quantiser of 8 bits for each token."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, held):
        return held[0] * held[1]


STORES = {"plain": DynamicLayer, "fp8": Fp8QuantizedLayer, "groups": lambda: InGroups(residual_length=4)}


def held(layer):
    """All plain tensors that a layer holds, by itself or in others."""
    return [y for x in tree_leaves(vars(layer)) if isinstance(x, torch.Tensor) for y in parts(x)]


def parts(x):
    inside = x.__tensor_flatten__()[0] if hasattr(x, "__tensor_flatten__") else []
    return [z for name in inside for z in parts(getattr(x, name))] if inside else [x]


def same(one, other):
    assert len(held(one)) == len(held(other))
    assert all(map(torch.equal, held(one), held(other)))


class Beside:
    """A cache, and beside it transformers' layers that are given what its layers keep."""

    def __init__(self, empty, rows=2):
        self.cache, self.rows, self.seed = PositionCache(stores=[empty()]), rows, 0
        self.own = [empty() for _ in range(DEPTH)]

    def tokens(self, t):
        self.seed += 1
        return tokens(self.rows, t, self.seed)

    def step(self, t):
        """A forward that is not captured."""
        self.cache.begin()
        for i, own in enumerate(self.own):
            k, v = self.tokens(t)
            keys, values = self.cache.update(k, v, i)
            expected = own.update(k, v)
            assert torch.equal(keys, expected[0])
            assert torch.equal(values, expected[1])
            assert self.cache.layer_of(keys) is self.cache.layers[i]
        self.cache.end()

    def graph(self, t, keep):
        """What a captured graph does: of ``t`` tokens, layer i keeps the first keep[i]."""
        with self.cache.opened():
            assert all(type(x) is PositionLayer for x in self.cache.layers)
            for i, own in enumerate(self.own):
                layer, (k, v) = self.cache.layer(i), self.tokens(keep[i])
                pos = torch.arange(layer.seen, layer.seen + keep[i]).repeat(self.rows, 1)
                if layer.keys is not None:
                    nothing = k[:, :, :0], v[:, :, :0]
                    expected = copy.copy(own).update(*nothing)
                    assert torch.equal(layer.keys, expected[0])
                    assert torch.equal(layer.values, expected[1])
                grown = torch.ops.vlm.kv_append(layer.keys, layer.values, layer.positions, k, v, pos)
                layer.keys, layer.values, layer.positions = grown
                layer.seen, layer.is_initialized = layer.seen + t, True
                own.update(k, v)

    def rows_from(self, index):
        self.rows = len(index)
        for own in self.own:
            own.reorder_cache(index)

    def check(self):
        for layer, own in zip(self.cache.layers, self.own, strict=True):
            assert layer.keys is None
            assert layer.values is None
            same(layer.store, own)
            assert layer.positions.shape == (self.rows, own.get_seq_length())


@torch.no_grad()
@pytest.mark.parametrize("name", STORES)
def test_what_is_stored_is_what_transformers_stores(name):
    it = Beside(STORES[name])
    it.graph(9, [9, 9, 5])
    it.check()
    assert it.cache.kv_lengths() == [9, 9, 5]
    for t in (1, 1, 2):
        it.step(t)
    it.cache.reorder_cache(torch.tensor([1, 1]))
    it.rows_from(torch.tensor([1, 1]))
    it.graph(6, [6, 2, 1])
    it.check()
    it.cache.batch_repeat_interleave(2)
    it.rows_from(torch.tensor([0, 0, 1, 1]))
    it.step(1)
    it.cache.batch_select_indices(torch.tensor([3, 0, 1]))
    it.rows_from(torch.tensor([3, 0, 1]))
    it.cache.reorder_cache(torch.tensor([2, 2, 0]))
    it.rows_from(torch.tensor([2, 2, 0]))
    for _ in range(5):
        it.step(1)
    it.check()
    assert it.cache.get_seq_length() == 9 + 4 + 6 + 1 + 5
    assert it.cache.kv_lengths() == [25, 21, 16]


@torch.no_grad()
@pytest.mark.parametrize("name", STORES)
def test_a_copy_goes_its_own_way_and_one_that_is_reset_is_empty(name):
    it = Beside(STORES[name])
    it.step(5)
    it.cache.reorder_cache(torch.tensor([1, 0]))
    it.rows_from(torch.tensor([1, 0]))
    other = copy.deepcopy(it)
    it.step(3)
    other.step(1)
    other.check()
    it.check()
    it.cache.reset()
    it.own = [STORES[name]() for _ in range(DEPTH)]
    assert it.cache.kv_bytes() == 0
    assert it.cache.get_seq_length() == 0
    it.graph(4, [4, 3, 2])
    it.step(1)
    it.check()


@torch.no_grad()
@pytest.mark.parametrize("name", STORES)
def test_a_forward_that_fails_stores_nothing(name):
    it = Beside(STORES[name])
    it.step(5)

    def half():
        with it.cache.opened():
            layer = it.cache.layers[0]
            layer.keys, layer.seen = torch.cat([layer.keys, layer.keys], 2), 10
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        half()
    it.check()
    assert it.cache.get_seq_length() == 5
    it.step(1)
    it.check()


@torch.no_grad()
def test_tokens_are_forgotten_where_they_were_not_quantised():
    it = Beside(DynamicLayer)
    it.graph(9, [9, 4, 5])
    it.step(2)
    it.cache.crop(-3)
    assert it.cache.kv_lengths() == [8, 4, 5]  # the last two of the prompt had been dropped in the others
    assert it.cache.get_seq_length() == 8
    for own, n in zip(it.own, (3, 2, 2), strict=True):
        own.crop(-n)
    it.step(1)
    it.check()
    assert [layer.positions[0, -1].item() for layer in it.cache.layers] == [8] * DEPTH
    for name in ("fp8", "groups"):
        it = Beside(STORES[name])
        it.step(3)
        it.cache.crop(0)
        assert not it.cache.is_croppable
        with pytest.raises(NotImplementedError, match=r"^crop\(-1\) of a quantised cache, .*: start with an empty"):
            it.cache.crop(-1)
        it.check()


@torch.no_grad()
def test_bytes_are_those_that_are_stored():
    it = Beside(Fp8QuantizedLayer)
    it.graph(9, [9, 9, 5])
    scale = 4
    assert it.cache.kv_bytes() == 2 * HEADS * (9 + 9 + 5) * (D + DV) + DEPTH * 2 * scale
    it = Beside(STORES["groups"])
    it.graph(9, [9, 9, 5])
    it.step(2)
    of_token = D + DV + 2 * scale
    assert it.cache.kv_bytes() == 2 * HEADS * ((9 + 9 + 5) * of_token + DEPTH * 2 * (D + DV) * 4)


@torch.no_grad()
def test_a_tensor_of_the_same_identity_is_not_taken_for_a_layers_keys():
    """What a layer returns is nobody's but the attention's: its identity is another's as soon as it is gone."""
    it = Beside(Fp8QuantizedLayer)
    it.graph(9, [9, 5, 5])
    cache, found = it.cache, False
    for _ in range(20):
        cache.begin()
        of = id(cache.update(*it.tokens(1), 0)[0])
        cache.update(*it.tokens(1), 1)
        m = cache.kv_lengths()[1]
        made = [torch.empty(it.rows, HEADS, m, D) for _ in range(100)]
        for again in (x for x in made if id(x) == of):
            found = True
            assert cache.layer_of(again) is cache.layers[1]
        cache.end()
    assert found, "no tensor came to lie where a layer's keys had been"


@torch.no_grad()
def test_each_layer_may_have_a_store_of_its_own():
    cache = PositionCache(stores=[InGroups(residual_length=2), InGroups(residual_length=50)])
    cache.begin()
    for t in (4, 1, 1, 1):
        for i in range(DEPTH):
            cache.update(*tokens(1, t, t + i), i)
    assert [x.store.keys.shape[-2] if x.store.keys.dim() == 4 else 0 for x in cache.layers] == [1, 3, 3]
    assert all(isinstance(x, StoredLayer) for x in cache.layers)
