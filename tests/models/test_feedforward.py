"""Decoders with layers that are feed-forward alone: they run on the tokens of their set, and keep nothing."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import NemotronHConfig

import vlmrewrite as vr
from vlmrewrite.passes import DPVR, STS, VISOR, FastV, ShortV, Stride
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import Row
from vlmrewrite.testing.models.families import llava_of
from vlmrewrite.testing.models.tiny import decoder_sizes

BATCH = [Row(2, 2, 3), Row(1, 4, 3), Row(0, 9, 1)]

EXPERTS = {"n_routed_experts": 4, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32}

KINDS = {
    "in turns": ["full_attention", "mlp", "full_attention", "moe"],
    "first and last": ["mlp", "full_attention", "full_attention", "mlp"],
    "one behind the other": ["full_attention", "moe", "mlp", "full_attention"],
}

RECIPES = {
    "stride": [Stride(0.5)],
    "stride at each": [Stride(3, at=1), Stride(2, at=2), Stride(1, at=3)],
    "dpvr": [DPVR(at=1)],
    "dpvr from the first on": [DPVR(at=0)],
    "shortv": [ShortV(layers=(1, 2))],
    "visor": [VISOR(self_layers=(0, 1), cross_layers=(2, 3))],
}


@functools.cache
def tiny_of(kinds):
    config = NemotronHConfig(**decoder_sizes(4, head_dim=8, layers_block_type=KINDS[kinds], **EXPERTS))
    return llava_of("feedforward", config, 0)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.slow
def test_agrees_with_the_oracle(kinds, recipe):
    tiny = tiny_of(kinds)
    for side in ("left", "right"):
        forward_agreement(tiny.model, tiny.inputs(BATCH, side=side), RECIPES[recipe]).check()


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.slow
def test_generates_as_the_oracle_says(kinds):
    tiny = tiny_of(kinds)
    found = generation_agreement(tiny.model, tiny.inputs(BATCH, side="left"), [Stride(3)], new_tokens=5)
    found.check()
    idle = [i for i, kind in enumerate(KINDS[kinds]) if kind != "full_attention"]
    assert [found.kv_lengths[i] for i in idle] == [0, 0]


@torch.no_grad()
def test_forgets_tokens_and_has_an_assistant():
    tiny = tiny_of("in turns")
    inputs = tiny.inputs([Row(1, 3, 4)])
    with vr.applied(tiny.model, [Stride(3)]):
        greedy = tiny.model.generate(**inputs, do_sample=False, max_new_tokens=6, min_new_tokens=6)
        out = tiny.model(**inputs, use_cache=True)
        cache, n = out.past_key_values, inputs["input_ids"].shape[1]
        first = tiny.model(input_ids=greedy[:, n : n + 3], past_key_values=cache).logits
        cache.crop(-2)
        again = tiny.model(input_ids=greedy[:, n + 1 : n + 3], past_key_values=cache).logits
        torch.testing.assert_close(again, first[:, 1:], rtol=1e-5, atol=1e-5)
        guessed = tiny.model.generate(**inputs, do_sample=False, max_new_tokens=6, prompt_lookup_num_tokens=2)
        assert guessed.tolist() == greedy.tolist()


@pytest.mark.parametrize(("made", "at"), [(STS(keep=5, refine=3, at=1), 1), (FastV(keep=0.5, at=1), 1)])
def test_what_goes_by_attention_there_is_refused(made, at):
    tiny = tiny_of("in turns")
    said = rf"layer {at} is feed-forward and pays no attention to choose by; expected one of the .* attention, 0, 2"
    with pytest.raises(ValueError, match=said):
        vr.verify(tiny.model, tiny.inputs([Row(1)]), [made])


@torch.no_grad()
def test_is_told():
    tiny = tiny_of("in turns")
    program = vr.rewrite(vr.trace(tiny.model, tiny.inputs([Row(1)])), [Stride(3)])
    assert "feed-forward" in str(program)
    assert "recurrent" not in str(program)
    costs = [c.flops for c in program.costs(program.call.counts)]
    whole = [c.flops for c in vr.trace(tiny.model, tiny.inputs([Row(1)])).costs(program.call.counts)]
    assert all(0 < a < b for a, b in zip(costs, whole, strict=True))


def test_learns_through_them():
    tiny = tiny_of("one behind the other")
    inputs = tiny.inputs(BATCH, side="left")
    with vr.applied(tiny.model, [DPVR(at=1)]):
        tiny.model(**inputs, labels=inputs["input_ids"]).loss.backward()
        learned = {name: p.grad for name, p in tiny.model.named_parameters() if p.requires_grad}
        assert learned
        assert all(g is not None and g.abs().sum() > 0 for g in learned.values())
    tiny.model.zero_grad()
