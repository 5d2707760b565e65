"""Caches of other kinds that a rewritten model is given, or that its `generate()` is asked to make."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, QuantizedCache, StaticCache
from transformers.cache_utils import Fp8QuantizedLayer

import vlmrewrite as vr
from tests.models.test_recurrent import tiny
from tests.small import family, with_heads_of_their_own
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.kvcache.stored import StoredLayer
from vlmrewrite.passes import STS, Stride
from vlmrewrite.testing.models import Row

ONE, SOME, ALL = [Row(1, 2, 3)], [STS(keep=6, refine=3, at=2)], [Stride(1.0)]
BATCH = [Row(1, 2, 3), Row(2, 5, 6)]
GREEDY = {"do_sample": False, "max_new_tokens": 3}
QUANTISED = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
TOLD = GREEDY | {"output_logits": True, "return_dict_in_generate": True}


@pytest.mark.parametrize("where", ["call", "config of the call", "config"])
def test_caches_that_cannot_be_are_refused_before_generate_makes_them(llava, where, monkeypatch):
    name = "paged"
    model, how = llava.model, GREEDY | llava.inputs(ONE, seed=13)
    if where == "call":
        how["cache_implementation"] = name
    elif where == "config of the call":
        how["generation_config"] = GenerationConfig(cache_implementation=name)
    else:
        monkeypatch.setattr(model.generation_config, "cache_implementation", name)
    with vr.applied(model, SOME):
        with pytest.raises(NotImplementedError, match=f"^cache_implementation='{name}': .*; leave it out"):
            model.generate(**how)
        if where == "config":
            monkeypatch.undo()
            model.generate(**how, cache_implementation="static")


def test_an_implementation_without_a_cache_plays_no_part(llava):
    how = GREEDY | llava.inputs(ONE, seed=13)
    with vr.applied(llava.model, SOME):
        expected = llava.model.generate(**how, use_cache=False)
        assert torch.equal(llava.model.generate(**how, use_cache=False, cache_implementation="offloaded"), expected)


def test_continuous_batching_is_refused(llava):
    with vr.applied(llava.model, SOME), pytest.raises(ValueError, match="continuous batching shares one"):
        llava.model.generate_batch([[5, 6]], max_new_tokens=1)


@pytest.mark.slow
@pytest.mark.parametrize("beams", [1, 2])
def test_a_quantised_cache_without_a_dropped_token_is_the_unmodified_models(beams):
    tiny = with_heads_of_their_own()
    how = TOLD | {"max_new_tokens": 8, "num_beams": beams} | QUANTISED | tiny.inputs([Row(2, 3, 4)], seed=13)
    expected = tiny.model.generate(**how)
    with vr.applied(tiny.model, ALL):
        got = tiny.model.generate(**how)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))
    for layer, own in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        for name in ("_quantized_keys", "_quantized_values"):
            assert all(map(torch.equal, getattr(layer.store, name), getattr(own, name)))


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "beams"), [(ONE, 1), (BATCH, 1), (BATCH, 2)])
def test_what_is_left_of_a_prompt_is_quantised_as_transformers_does(llava, rows, beams, monkeypatch):
    """Each layer of transformers', fed what a layer keeps in the same calls, shows and holds the same."""
    steps, update = [], StoredLayer.update
    inputs = llava.inputs(rows, side="left", seed=13)

    def watched(self, k, v, *args, **kwargs):
        out = update(self, k, v, *args, **kwargs)
        steps.append((k, v, *out))
        return out

    reorders, reorder = [], PositionCache.reorder_cache
    how = TOLD | {"num_beams": beams}
    with vr.applied(llava.model, SOME):
        prompt = llava.model.generate(**inputs, **how | {"max_new_tokens": 1}).past_key_values.layers
        monkeypatch.setattr(StoredLayer, "update", watched)
        monkeypatch.setattr(PositionCache, "reorder_cache", lambda self, x: (reorders.append(x), reorder(self, x))[1])
        cache = llava.model.generate(**inputs, **how | {"max_new_tokens": 5} | QUANTISED).past_key_values
    depth = len(prompt)
    assert len(steps) == 4 * depth
    assert prompt[-1].keys.shape[2] < prompt[0].keys.shape[2]
    for i, (layer, of_prompt) in enumerate(zip(cache.layers, prompt, strict=True)):
        own = Fp8QuantizedLayer()
        own.update(of_prompt.keys, of_prompt.values)
        for n, (k, v, *shown) in enumerate(steps[i::depth]):
            if beams > 1:
                own.reorder_cache(reorders[n])
            assert all(map(torch.equal, own.update(k, v), shown))
        if len(reorders) > 4:
            own.reorder_cache(reorders[4])
        for name in ("_quantized_keys", "_quantized_values"):
            assert all(map(torch.equal, getattr(layer.store, name), getattr(own, name)))
    scale, (batch, heads, _, dim) = 4, prompt[0].keys.shape
    assert cache.kv_bytes() == 2 * sum(batch * heads * n * dim + scale for n in cache.kv_lengths())


@pytest.mark.slow
@torch.no_grad()
def test_turns_on_a_quantised_cache(llava):
    model, turns = llava.model, [llava.inputs(ONE, seed=13), llava.inputs([Row(1, 1, 8)], seed=14)]
    cache, said = QuantizedCache("fp8", model.config), None
    with vr.applied(model, SOME):
        for x in turns:
            said = x["input_ids"] if said is None else torch.cat([said, x["input_ids"]], 1)
            how = GREEDY | {"past_key_values": cache, "pixel_values": x["pixel_values"]}
            said = model.generate(input_ids=said, attention_mask=torch.ones_like(said), **how)
        assert cache.get_seq_length() == said.shape[1] - 1
        lengths = cache.kv_lengths()
        assert lengths[-1] < lengths[0] < cache.get_seq_length()
        for layer, n in zip(cache.layers, lengths, strict=True):
            assert type(layer.store) is Fp8QuantizedLayer
            assert layer.store.get_seq_length() == n
        other, one = copy.deepcopy(cache), torch.tensor([[9]])
        assert torch.equal(*(model(input_ids=one, past_key_values=x).logits for x in (cache, other)))
        with pytest.raises(NotImplementedError, match=r"^crop\(-1\) of a quantised cache, .*without an assistant$"):
            cache.crop(-1)
        assert cache.kv_lengths() == [n + 1 for n in lengths]
        with pytest.raises(NotImplementedError, match=r"of a quantised cache, .*without an assistant$"):
            model.generate(**turns[0], **QUANTISED, do_sample=False, max_new_tokens=8, prompt_lookup_num_tokens=2)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["quantised", "offloaded", "offloaded static"])
def test_a_cache_of_another_kind_is_given_back_where_a_forward_fails(llava, name):
    model, inputs = llava.model, llava.inputs(ONE, seed=13)
    cache = {
        "quantised": lambda: QuantizedCache("fp8", model.config),
        "offloaded": lambda: DynamicCache(offloading=True),
        "offloaded static": lambda: StaticCache(model.config, inputs["input_ids"].shape[1] + 9, offloading=True),
    }[name]()
    kind, layers = type(cache), [*cache.layers]

    def fail(*_):
        raise RuntimeError("not this time")

    with vr.applied(model, SOME):
        head = model.lm_head.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="not this time"):
            model(input_ids=torch.tensor([[5, 6]]), past_key_values=cache)
        head.remove()
        assert type(cache) is kind
        assert cache.layers == layers
        assert cache.get_seq_length() == 0
        expected = model(**inputs).logits
        assert torch.equal(model(**inputs, past_key_values=cache).logits, expected)
        assert isinstance(cache, PositionCache)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "beams"), [(ONE, 1), (BATCH, 1), (BATCH, 2)])
@pytest.mark.parametrize("name", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_gives_the_same(llava, rows, beams, name):
    how = TOLD | {"max_new_tokens": 5, "num_beams": beams} | llava.inputs(rows, side="left", seed=13)
    with vr.applied(llava.model, SOME):
        expected = llava.model.generate(**how)
        got = llava.model.generate(**how, cache_implementation=name)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))
    cache, other = got.past_key_values, expected.past_key_values
    assert cache.offloading
    assert cache.kv_bytes() == other.kv_bytes()
    for layer, plain in zip(cache.layers, other.layers, strict=True):
        assert layer.keys is None
        assert all(map(torch.equal, (layer.store.keys, layer.store.values), (plain.keys, plain.values)))


def test_an_assistant_on_an_offloaded_cache(llava):
    how = GREEDY | {"max_new_tokens": 6} | llava.inputs(ONE, seed=14)
    with vr.applied(llava.model, SOME):
        expected = llava.model.generate(**how)
        got = llava.model.generate(**how, prompt_lookup_num_tokens=2, past_key_values=DynamicCache(offloading=True))
    assert torch.equal(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "recurrent"])
def test_windows_and_states_beside_keys_that_are_offloaded(name):
    one = family("gemma3") if name == "gemma3" else tiny("convolutions with a bias")
    how = GREEDY | one.inputs(BATCH, side="left") | {"return_dict_in_generate": True}
    with vr.applied(one.model, [Stride(0.5)]):
        expected, got = (one.model.generate(**how, **x) for x in ({}, {"cache_implementation": "offloaded"}))
    assert torch.equal(got.sequences, expected.sequences)
    assert got.past_key_values.kv_lengths() == expected.past_key_values.kv_lengths()
    states = {"StateLayer"} if name != "gemma3" else set()
    assert {type(x).__name__ for x in got.past_key_values.layers} == {"StoredLayer"} | states
