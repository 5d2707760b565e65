"""Any plan agrees with the oracle, in all the ways a rewritten model is called. 2,000 examples in the long profile."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

import vlmrewrite as vr
from tests.small import batches, crossed, family, long
from vlmrewrite.oracle import hooks, layer_masks
from vlmrewrite.passes import STS, FastV, Random, Stride
from vlmrewrite.plan.tokens import All, Image, Text, Vision
from vlmrewrite.plan.vocabulary import Policy
from vlmrewrite.testing import strategies
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement, logits_agreement
from vlmrewrite.testing.models import FAMILIES, Row
from vlmrewrite.testing.strategies import Sets

ONE, BATCH = [Row(2, 1, 3)], [Row(2, 1, 2), Row(0, 4, 2), Row(1, 3, 4)]
ROWS = {"padded batch": BATCH, "one row": ONE}
OTHERS = [name for name in FAMILIES if name != "llava"] if long() else ["qwen2_5_vl", "gemma3"]
FEW = settings(max_examples=max(3, settings.default.max_examples // 7))


@functools.cache
def policy(name, seed=0):
    ops = torch.ops.vlm
    return {
        "stride": Policy("stride", ops.stride_sample.default),
        "random": Policy("random", ops.random_sample.default, ("ordinal",), (seed,)),
        "repulsion": Policy("repulsion", ops.sts_sample.default, ("features",)),
        "relevance": Policy("relevance", ops.top_attention.default, ("attention",)),
    }[name]


# ---- plans


A, B = Vision.select(policy("stride"), 5), Vision.select(policy("random"), 0.4)
LATE = (Vision - Image(0)).select(policy("relevance"), 6, at=2)
PLANS = {
    "without the first image": [(All - Image(0),)] * 4,
    "another image each": [(Text | Image(0),), (Text | Image(1),), (All,), (All - Image(1),)],
    "bypass and rejoin": [(All,), (Text,), (Text, All), (All,)],
    "rejoin before anything ran on all": [(Text,), (Text | A,), (All,), (Text | B,)],
    "fewer keys": [(All, Text), (All, Text | A), (Text | A, Text), (All,)],
    "more keys": [(Text, All), (Text | A, All), (Text | (A - B), Text | A), (Text, All)],
    "other keys": [(Text | A, Text | B), (Text | Image(0), Text | Image(1)), (All - A, Text | A), (Text | B, All - B)],
    "algebra": [((Text | A) - B,), (All - A,), (Text | (A & B),), ((Text | A | B) - Image(1),)],
    "selections of selections": [
        (Text | A,),
        (Text | A.select(policy("repulsion"), 3, at=1),),
        (Text | LATE, All),
        (Text | LATE.select(policy("random"), 2, at=3), Text | (A | LATE)),
    ],
    "an image nobody has": [(Text | Image(2),), (All - Image(2),), (Text, Text | Image(2)), (All,)],
    "attention halves": [
        (All, None, Text),
        (All, Text, All - A),
        (Text | A, All, Text | (A & B)),
        (All, None, Text | B),
    ],
}


def told(layers):
    return Sets(tuple((*sets, None, None)[:3] for sets in layers))


@pytest.mark.parametrize(("rows", "layers"), crossed(ROWS, PLANS))
def test_plan(rows, layers):
    tiny = family("llava")
    generation_agreement(tiny.model, tiny.inputs(ROWS[rows], seed=1), told(PLANS[layers])).check()


@given(strategies.plans(4), strategies.rows(), strategies.sides(), st.integers(1, 4), st.integers(0, 99))
def test_any_plan_generates_as_the_oracle(plan, rows, side, new_tokens, seed):
    tiny = family("llava")
    generation_agreement(tiny.model, tiny.inputs(rows, side=side, seed=seed), plan, new_tokens).check()


@pytest.mark.parametrize("name", OTHERS)
def test_any_plan_in_other_families(name):
    tiny = family(name)

    @FEW
    @given(strategies.plans(4), strategies.sides(), st.integers(0, 99))
    def agrees(plan, side, seed):
        generation_agreement(tiny.model, tiny.inputs(BATCH, side=side, seed=seed), plan, 2).check()

    agrees()


@given(
    strategies.plans(4),
    st.sampled_from([Stride, Random, FastV]),
    strategies.budgets(),
    strategies.depths(4),
    batches(),
    st.integers(0, 99),
)
def test_a_pruning_pass_narrows_any_plan(plan, kind, keep, at, rows, seed):
    tiny = family("llava")
    passes = [plan, kind(keep=keep, at=at)]  # it is refused where the plan leaves no vision tokens
    generation_agreement(tiny.model, tiny.inputs(rows, seed=seed), passes, 2, strict=False).check()


def test_narrowing_behind_a_selection_that_is_used_deeper():
    tiny = family("llava")
    recipe = [told([(All,), (All,), (All,), (Text | A,)]), Stride(keep=3, at=2)]
    generation_agreement(tiny.model, tiny.inputs(BATCH, seed=1), recipe).check()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if long() else [torch.float16])
def test_any_plan_in_sixteen_bits(dtype):
    tiny = family("llava", dtype=dtype)

    @FEW
    @given(strategies.plans(4), strategies.sides(), st.integers(0, 99))
    def agrees(plan, side, seed):
        inputs = tiny.inputs(BATCH, side=side, seed=seed)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        forward_agreement(tiny.model, inputs, plan).check()

    agrees()


@torch.no_grad()
def test_a_plan_for_another_depth_is_refused():
    tiny = family("llava")
    with pytest.raises(ValueError, match="it has sets for 2 layers, the decoder has 4"):
        vr.rewrite(vr.trace(tiny.model, tiny.inputs(BATCH)), told([(All,), (All,)]), strict=True)


# ---- what a policy is told


@given(st.data(), batches(), strategies.sides(), st.integers(0, 99))
def test_attention_is_what_the_last_prompt_token_pays_in_the_oracle(data, rows, side, seed):
    """At layer 2, over text and source, whatever the layers before it ran on."""
    tiny = family("llava")
    plan = data.draw(strategies.plans(2))
    source = data.draw(st.sampled_from([Vision, Image(0), Vision - Image(0), *plan.sources(1)]))
    seen = []

    def all_of_them(weights, member, lengths, keep):
        seen.append((weights, member))
        return member

    kept = source.select(Policy("told", all_of_them, ("attention",)), 99, at=2)
    inputs = tiny.inputs(rows, side=side, seed=seed)
    with torch.no_grad(), vr.applied(tiny.model, told([*plan.layers, (Text | kept,), (All,)])):
        tiny.model(**inputs)
        masks = layer_masks(tiny.model)
    (weights, member), vision = seen[-1], inputs["input_ids"] == tiny.image_token_id
    assert torch.equal(torch.zeros_like(vision).masked_scatter(vision, member), masks[2].run & vision)
    expected = paid(tiny, inputs, masks, 2)[vision]
    torch.testing.assert_close(weights[member], expected[member], atol=1e-5, rtol=1e-4)


def paid(tiny, inputs, masks, layer):
    """Weights of the last prompt token in the oracle, mean over heads, fp32 [B, T]."""
    seen = {}

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        visible = attention_mask & hooks._STATE.get().keys[module.layer_idx][:, None, None, :]
        bias = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        out, weights = eager_attention_forward(module, query, key, value, bias, scaling=scaling)
        blind = ~visible.any(-1, keepdim=True)  # what sees no key gets nothing; eager attention averages over all keys
        seen[module.layer_idx] = weights.masked_fill(blind, 0)
        return out.masked_fill(blind.transpose(1, 2), 0), None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "_attention", attention)
        hooks.oracle_logits(tiny.model, inputs, masks)
    last = (inputs["attention_mask"] * torch.arange(inputs["input_ids"].shape[1])).argmax(1)
    return seen[layer].mean(1)[torch.arange(len(last)), last]


# ---- ways to call


TURNS = {"sts": [STS(keep=6, refine=3, at=2)], "other keys": told(PLANS["other keys"])}


@pytest.mark.parametrize(("name", "recipe"), crossed(["llava", "qwen2_5_vl", "gemma3"], TURNS))
def test_a_padded_text_turn_on_the_kept_cache(name, recipe):
    """Images in turn 1, padded left; text of different lengths in turn 2, padded left between the turns."""
    tiny = family(name)
    inputs = tiny.inputs(BATCH, side="left", seed=4)
    question = tiny.inputs([Row(0, 0, 3), Row(0, 0, 5), Row(0, 0, 1)], side="left", seed=5)
    length, more = inputs["input_ids"].shape[1], question["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], question["attention_mask"]], 1)
    with torch.no_grad(), vr.applied(tiny.model, TURNS[recipe]):
        first = tiny.model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True)
        masks = layer_masks(tiny.model, length + more)
        whole = positioned(tiny, inputs | {"attention_mask": mask}, question["input_ids"])
        turn = {"input_ids": question["input_ids"], "position_ids": whole["position_ids"][..., -more:]}
        if tiny.token_types is not None:
            turn[tiny.token_types] = torch.zeros_like(question["input_ids"])
        out = tiny.model(**turn, attention_mask=mask, past_key_values=first.past_key_values)
    real = question["attention_mask"].bool()
    logits_agreement(tiny.model, whole, masks, out.logits, real).check()


def positioned(tiny, inputs, more):
    """Inputs of one forward over the prompt and more text, with positions by the attention mask over both."""
    out = dict(inputs, input_ids=torch.cat([inputs["input_ids"], more], 1))
    prompt = inputs["input_ids"].shape[1]
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in out:
            out[name] = torch.nn.functional.pad(out[name], (0, more.shape[1]))
    known = {k: v for k, v in inputs.items() if k != "attention_mask"}
    known["attention_mask"] = inputs["attention_mask"][:, :prompt]
    first = tiny.model._prepare_position_ids_for_generation(inputs["input_ids"], known)
    later = inputs["attention_mask"][:, prompt:].cumsum(1)
    out["position_ids"] = torch.cat([first, first[..., -1:] + later], -1)
    return out


def test_a_generated_text_turn_on_the_kept_cache():
    tiny = family("llava")
    model, inputs = tiny.model, tiny.inputs(BATCH, side="left", seed=6)
    question = tiny.inputs([Row(0, 0, 3), Row(0, 0, 5), Row(0, 0, 1)], side="left", seed=7)
    greedy = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad(), vr.applied(model, [Stride(keep=6), Random(keep=3, at=2)]):
        first = model.generate(**inputs, **greedy, max_new_tokens=3)
        masks = layer_masks(model, first.sequences.shape[1] + question["input_ids"].shape[1] + 3)
        ids = torch.cat([first.sequences, question["input_ids"]], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, 3).long(), question["attention_mask"]], 1)
        again = model.generate(
            ids, attention_mask=mask, past_key_values=first.past_key_values, **greedy, max_new_tokens=4
        )
    assert again.past_key_values.get_seq_length() == ids.shape[1] + 3
    whole = {
        "input_ids": again.sequences[:, :-1],
        "attention_mask": torch.nn.functional.pad(mask, (0, 3), value=1),
        "pixel_values": inputs["pixel_values"],
    }
    whole["position_ids"] = (whole["attention_mask"].cumsum(1) - 1).clamp(min=0)
    logits_agreement(model, whole, masks, torch.stack(again.logits, 1)).check()
