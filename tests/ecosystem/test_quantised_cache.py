"""transformers' quantised cache with HQQ's quantiser and with quanto's, and recipes on it."""

from __future__ import annotations

import pytest
import torch
from transformers import QuantizedCache

import vlmrewrite as vr
from tests.small import family, with_heads_of_their_own
from tests.unit.test_cache_stores import held
from vlmrewrite.kvcache.stored import StoredLayer
from vlmrewrite.passes import STS, Stride
from vlmrewrite.testing.models import Row

GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
AXES = {"axis_key": 1, "axis_value": 1}
WAYS = {
    "4 bits, a short window": {"backend": "hqq", "nbits": 4, "q_group_size": 16, "residual_length": 4},
    "4 bits, other axes": {"backend": "hqq", "nbits": 4, "q_group_size": 8, "residual_length": 3} | AXES,
    "2 bits, a long window": {"backend": "hqq", "nbits": 2, "q_group_size": 16},
    "quanto, 4 bits": {"backend": "quanto", "nbits": 4, "q_group_size": 8, "residual_length": 4},
    "quanto, 2 bits": {"backend": "quanto", "nbits": 2, "q_group_size": 16, "residual_length": 3},
}


def same(one, other):
    assert len(held(one)) == len(held(other)) > 4
    assert all(map(torch.equal, held(one), held(other)))


@pytest.fixture(autouse=True)
def _quantisers():
    pytest.importorskip("hqq.core.quantize")
    pytest.importorskip("optimum.quanto")


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", WAYS)
def test_without_a_dropped_token_it_is_the_unmodified_models(name, beams):
    tiny = with_heads_of_their_own()
    how = GREEDY | {"max_new_tokens": 9, "num_beams": beams, "cache_implementation": "quantized"}
    how |= {"cache_config": WAYS[name]} | tiny.inputs([Row(2, 3, 4)], seed=13)
    expected = tiny.model.generate(**how)
    with vr.applied(tiny.model, [Stride(1.0)]):
        got = tiny.model.generate(**how)
    assert torch.equal(got.sequences, expected.sequences)
    assert all(map(torch.equal, got.logits, expected.logits))
    for layer, own in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
        same(layer.store, own)


@pytest.mark.parametrize("name", WAYS)
def test_what_is_left_of_a_prompt_is_quantised_as_transformers_does(name, monkeypatch):
    """Each layer of transformers', fed what a layer keeps in the same calls, shows and holds the same."""
    tiny, steps, update = family("llava"), [], StoredLayer.update
    inputs = tiny.inputs([Row(1, 2, 3), Row(2, 5, 6)], side="left", seed=13)

    def watched(self, k, v, *args, **kwargs):
        out = update(self, k, v, *args, **kwargs)
        steps.append((k, v, *out))
        return out

    monkeypatch.setattr(StoredLayer, "update", watched)
    cache, other = (QuantizedCache(config=tiny.model.config, **WAYS[name]) for _ in range(2))
    fresh = other.layers
    with vr.applied(tiny.model, [STS(keep=6, refine=3, at=2)]):
        prompt = tiny.model.generate(**inputs, **GREEDY, max_new_tokens=1).past_key_values.layers
        tiny.model.generate(**inputs, **GREEDY, max_new_tokens=9, past_key_values=cache)
    assert len(steps) == 8 * len(prompt)
    assert prompt[-1].keys.shape[2] < prompt[0].keys.shape[2]
    for i, (layer, of_prompt, own) in enumerate(zip(cache.layers, prompt, fresh, strict=True)):
        own.update(of_prompt.keys, of_prompt.values)
        for k, v, *shown in steps[i :: len(prompt)]:
            assert all(map(torch.equal, own.update(k, v), shown))
        same(layer.store, own)
        assert layer.nbytes() == sum(x.nbytes for x in held(own))
        assert layer.nbytes() < sum(x.nbytes for x in layer.opened().__dict__.values() if isinstance(x, torch.Tensor))
