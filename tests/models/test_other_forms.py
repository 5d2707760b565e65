"""What a rewritten model is given in other forms: static caches, embeddings, any attention implementation."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, StaticCache

import vlmrewrite as vr
from tests.small import family
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


@torch.no_grad()
def test_a_static_cache_is_given_back_where_generate_fails(llava):
    model, inputs = llava.model, llava.inputs(ONE, seed=13)
    cache = StaticCache(config=model.config.text_config, max_cache_len=inputs["input_ids"].shape[1] + 9)

    def fail(*_):
        raise RuntimeError("not this time")

    with vr.applied(model, SOME), pytest.raises(RuntimeError, match="not this time"):
        model.generate(**inputs, **GREEDY, past_key_values=cache, logits_processor=[fail])
    assert type(cache) is StaticCache
    assert cache.get_seq_length() == 0


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_embeddings_that_hold_images_already(name):
    tiny = family(name)
    model, inputs, given = tiny.model, tiny.inputs(BATCH, side="left"), {}
    hook = model.get_decoder().register_forward_pre_hook(lambda _, __, kwargs: given.update(kwargs), with_kwargs=True)
    model(**inputs)
    hook.remove()
    same = {name: given[name] for name in ("inputs_embeds", "position_ids")} | {
        "attention_mask": inputs["attention_mask"]
    }
    types, real = (inputs["input_ids"] == tiny.image_token_id).long(), inputs["attention_mask"].bool()
    with vr.applied(model, SOME):
        expected, kept = model(**inputs).logits, vr.kept_tokens(model)[-1].vision
        cache = DynamicCache()
        got = model(**same, mm_token_type_ids=types, past_key_values=cache).logits
        torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)
        assert torch.equal(vr.kept_tokens(model)[-1].vision, kept)
        assert cache.layers[-1].keys.shape[2] < cache.layers[0].keys.shape[2]
        torch.testing.assert_close(model.base_model(**same, mm_token_type_ids=types, use_cache=False).last_hidden_state
                                   @ model.lm_head.weight.T, got)  # fmt: skip
        with pytest.warns(UserWarning, match=r"nothing of them is pruned: .* pass mm_token_type_ids too"):
            whole = model(**same).logits
    torch.testing.assert_close(whole[real], model(**inputs).logits[real], atol=1e-5, rtol=1e-5)


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
