"""What a rewritten model takes that was made for another: static caches, and any attention implementation."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vlmrewrite as vr
from vlmrewrite import compat
from vlmrewrite.passes import STS
from vlmrewrite.testing.models import Row

ONE, BATCH = [Row(2, 3, 4)], [Row(1, 2, 3), Row(2, 5, 6)]
GREEDY = {"do_sample": False, "max_new_tokens": 5}
SOME = [STS(keep=6, refine=3, at=2)]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_static_cache_is_one_whose_length_is_known(llava, beams):
    model, inputs = llava.model, llava.inputs(BATCH, side="left", seed=13)
    how = GREEDY | {"max_new_tokens": 6, "num_beams": beams}
    with vr.applied(model, SOME):
        expected = model.generate(**inputs, **how)
        got = model.generate(**inputs, **how, cache_implementation="static", return_dict_in_generate=True)
        assert torch.equal(got.sequences, expected)
    columns = inputs["input_ids"].shape[1]
    for layer in got.past_key_values.layers:
        assert layer.seen == columns + 5
        assert layer.length >= layer.seen


@torch.no_grad()
def test_a_static_cache_that_is_given(llava):
    model, inputs = llava.model, llava.inputs(ONE, seed=13)
    columns = inputs["input_ids"].shape[1]
    cache, other = StaticCache(config=model.config.text_config, max_cache_len=columns + 20), DynamicCache()
    with vr.applied(model, SOME):
        assert torch.equal(model(**inputs, past_key_values=cache).logits, model(**inputs, past_key_values=other).logits)
        where = set()
        for token in range(20):
            one = torch.tensor([[token]])
            a, b = (model(input_ids=one, past_key_values=x).logits for x in (cache, other))
            assert torch.equal(a, b)
            where |= {layer.buffer.keys.data_ptr() for layer in cache.layers}
    assert len(where) == len(cache.layers)
    assert max(layer.buffer.keys.shape[2] for layer in cache.layers) <= columns + 21
    assert cache.layers[-1].buffer.keys.shape[2] < columns + 18


@pytest.mark.parametrize("name", ["eager", "flex_attention", "flash_attention_2", "paged|sdpa"])
def test_whatever_attention_the_model_has_it_has_again_afterwards(llava, name):
    model, inputs = llava.model, llava.inputs(ONE, seed=13)
    with vr.applied(model, SOME):
        expected = model.generate(**inputs, **GREEDY)
    config = model.get_decoder().config
    before = compat.attention_implementation(config)
    compat.set_attention_implementation(config, name)
    try:
        with vr.applied(model, SOME):
            assert torch.equal(model.generate(**inputs, **GREEDY), expected)
        assert compat.attention_implementation(model.get_decoder().config) == name
    finally:
        compat.set_attention_implementation(config, before)
