"""A rewritten model under generate() and forward(), in all the ways people call them."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

import vlmrewrite as vr
from tests.small import crossed, family, long
from vlmrewrite.kvcache.cache import PositionCache
from vlmrewrite.oracle import LayerMasks, layer_masks
from vlmrewrite.oracle.hooks import oracle_logits
from vlmrewrite.passes import DPVR, STS, VISOR, VTW, Random, ShortV, Stride, ViCA
from vlmrewrite.testing.agreement import extended, forward_agreement, generation_agreement
from vlmrewrite.testing.models import Row

ONE, BATCH = [Row(1, 2, 3)], [Row(2, 1, 2), Row(0, 4, 2), Row(1, 3, 4)]
SOME = [STS(keep=6, refine=3, at=2)]
EVERYTHING = [Stride(keep=1_000_000, at=1)]
GREEDY = {"do_sample": False, "max_new_tokens": 6}


ROWS = {"padded batch": BATCH, "one row": ONE}
some_rows = pytest.mark.parametrize("rows", ROWS if long() else ["padded batch"])
HOW = {
    "greedy": GREEDY,
    "sampling": {"do_sample": True, "max_new_tokens": 6, "temperature": 0.7, "top_k": 8},
    "beams": {"do_sample": False, "num_beams": 3, "max_new_tokens": 6},
    "beam sampling": {"do_sample": True, "num_beams": 2, "max_new_tokens": 4},
    "two sequences": {"do_sample": True, "num_return_sequences": 2, "max_new_tokens": 4},
    "no cache": {**GREEDY, "use_cache": False},
    "penalty": {**GREEDY, "repetition_penalty": 1.3},
    "chunks": {**GREEDY, "prefill_chunk_size": 7},
}


@pytest.mark.wide
@pytest.mark.parametrize(("rows", "how"), crossed(ROWS, HOW))
def test_keeping_everything_generates_the_same(llava, rows, how):
    inputs, how = llava.inputs(ROWS[rows], side="left", seed=1), HOW[how]
    torch.manual_seed(0)
    expected = llava.model.generate(**inputs, **how)
    with vr.applied(llava.model, EVERYTHING):
        torch.manual_seed(0)
        assert torch.equal(llava.model.generate(**inputs, **how), expected)


@some_rows
def test_without_a_cache_as_with_one(llava, rows):
    inputs = llava.inputs(ROWS[rows], side="left", seed=2)
    with vr.applied(llava.model, [*SOME, Random(keep=2, at=3)]):
        cached = llava.model.generate(**inputs, **GREEDY)
        assert torch.equal(llava.model.generate(**inputs, **GREEDY, use_cache=False), cached)


def test_beams_reorder_every_layer(llava):
    inputs = llava.inputs(ONE, side="left", seed=3)
    how = {"num_beams": 4, "max_new_tokens": 5, "return_dict_in_generate": True, "output_scores": True}
    with vr.applied(llava.model, SOME):
        out = llava.model.generate(**inputs, do_sample=False, **how)
        masks = layer_masks(llava.model, inputs["input_ids"].shape[1] + 4)
    first = [LayerMasks(m.run[:1], m.keys[:1]) for m in masks]
    logits = oracle_logits(llava.model, extended(llava.model, inputs, out.sequences[:, -5:-1]), first)
    score = logits[0, -5:].log_softmax(-1).gather(1, out.sequences[0, -5:, None]).sum() / 5
    assert float(out.sequences_scores[0]) == pytest.approx(float(score), abs=1e-4)


def test_chat_goes_on_with_the_kept_cache(llava):
    """A second turn with a new image: both turns' selections, in one oracle run over the whole conversation."""
    model = llava.model
    first, second = llava.inputs(ONE, seed=4), llava.inputs([Row(1, 1, 2)], seed=5)
    with vr.applied(model, SOME):
        out = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        told = layer_masks(model, out.sequences.shape[1])
        ids = torch.cat([out.sequences, second["input_ids"]], 1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": second["pixel_values"]}
        again = model.generate(
            **more, **GREEDY, past_key_values=out.past_key_values, return_dict_in_generate=True, output_logits=True
        )
        asked = layer_masks(model, again.sequences.shape[1] - 1 - out.sequences.shape[1] + 1)
    before = out.sequences.shape[1] - 1
    masks = [
        LayerMasks(torch.cat([a.run[:, :before], b.run], 1), torch.cat([a.keys[:, :before], b.keys], 1))
        for a, b in zip(told, asked, strict=True)
    ]
    whole = {
        "input_ids": again.sequences[:, :-1],
        "attention_mask": torch.ones_like(again.sequences[:, :-1]),
        "pixel_values": torch.cat([first["pixel_values"], second["pixel_values"]]),
    }
    masks = [
        LayerMasks(m.run[:, : again.sequences.shape[1] - 1], m.keys[:, : again.sequences.shape[1] - 1]) for m in masks
    ]
    expected = oracle_logits(model, whole, masks)[:, -6:]
    torch.testing.assert_close(torch.stack(again.logits, 1), expected, atol=2e-4, rtol=0)


def test_a_text_turn_on_the_kept_cache(llava):
    model = llava.model
    inputs = llava.inputs(ONE, seed=4)
    question = torch.tensor([[9, 10, 11]])
    with vr.applied(model, SOME):
        out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, question], 1)
        again = model.generate(ids, past_key_values=out.past_key_values, **GREEDY)
        straight = copy.deepcopy(inputs) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        model.generate(**inputs, max_new_tokens=1)
        masks = layer_masks(model, again.shape[1] - 1)
    expected = oracle_logits(model, extended(model, straight, again[:, ids.shape[1] : -1]), masks)[:, -6:]
    expected[..., model.generation_config.suppress_tokens] = -torch.inf
    assert torch.equal(expected.argmax(-1), again[:, -6:])


@some_rows
def test_cropping_forgets_logical_tokens(llava, rows):
    rows = ROWS[rows]
    model, inputs = llava.model, llava.inputs(rows, side="left", seed=6)
    with vr.applied(model, SOME), torch.no_grad():
        out = model(**inputs)
        cache = out.past_key_values
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
        token = torch.full((len(rows), 1), 9)
        expected = model(input_ids=token, attention_mask=mask, past_key_values=cache).logits
        lengths = cache.kv_lengths()
        cache.crop(-1)
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        assert cache.kv_lengths() == [n - 1 for n in lengths]
        assert torch.equal(model(input_ids=token, attention_mask=mask, past_key_values=cache).logits, expected)
        cache.crop(-3)
        at = inputs["input_ids"].shape[1] - 2
        short = model(input_ids=inputs["input_ids"][:, at : at + 1], attention_mask=mask[:, : at + 1],
                      position_ids=torch.full((len(rows), 1), at), past_key_values=cache)  # fmt: skip
        torch.testing.assert_close(short.logits[:, 0], out.logits[:, at], atol=1e-4, rtol=0)


def test_rows_of_a_cache_can_be_picked_and_repeated(llava):
    model, inputs = llava.model, llava.inputs(BATCH, side="left", seed=6)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    token = torch.full((3, 1), 9)
    with vr.applied(model, SOME), torch.no_grad():
        cache = model(**inputs).past_key_values
        expected = model(input_ids=token, attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
        pick = torch.tensor([2, 0])
        cache.batch_select_indices(pick)
        cache.batch_repeat_interleave(2)
        twice = pick.repeat_interleave(2)
        got = model(input_ids=token[twice], attention_mask=mask[twice], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[twice], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_inputs_embeds(llava):
    model, inputs = llava.model, llava.inputs(BATCH, side="left", seed=7)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    by_embeds = {k: v for k, v in inputs.items() if k != "input_ids"} | {"inputs_embeds": embeds}
    with vr.applied(model, SOME), torch.no_grad():
        assert torch.equal(model(**by_embeds).logits, model(**inputs).logits)
        expected = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        assert torch.equal(model.generate(**by_embeds, **GREEDY), expected)


def test_text_only_prompts_are_untouched(llava):
    model, inputs = llava.model, llava.inputs([Row(0, 4, 4), Row(0, 1, 2)], side="left", seed=8)
    expected = model.generate(**inputs, **GREEDY)
    with vr.applied(model, SOME):
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)
        out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        assert isinstance(out.past_key_values, PositionCache)
        notes = "; ".join(vr.report(model).notes)
        assert "calls went through the model as it is, prompts of text alone, which is right" in notes


@pytest.mark.slow
def test_forward_keeps_its_form(llava):
    model, inputs = llava.model, llava.inputs(BATCH, side="right", seed=9)
    plain = model(**inputs)
    with vr.applied(model, SOME), torch.no_grad():
        out = model(**inputs)
        assert type(out) is type(plain)
        assert out.logits.shape == plain.logits.shape
        assert out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
        assert model(**inputs, use_cache=False).past_key_values is None
        assert model(**inputs, logits_to_keep=2).logits.shape[1] == 2
        assert isinstance(model(**inputs, return_dict=False), tuple)
        by_position = model(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"])
        assert torch.equal(by_position.logits, out.logits)
        labels = inputs["input_ids"].clone()
        assert model(**inputs, labels=labels).loss.isfinite()


def test_gradients_flow_through_a_rewritten_model(llava):
    model, inputs = copy.deepcopy(llava.model).requires_grad_(True), llava.inputs(ONE, seed=10)
    with vr.applied(model, SOME):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) > 20
    assert all(g.isfinite().all() for g in grads)


def test_train_mode_and_dtype_stay_the_users(llava):
    model = copy.deepcopy(llava.model).train().to(torch.bfloat16)
    inputs = llava.inputs(ONE, seed=11)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with vr.applied(model, SOME), torch.no_grad():
        assert model(**inputs).logits.dtype == torch.bfloat16
        assert model.training
    assert model.training


def test_sixteen_bit_agrees_with_the_oracle(llava):
    model = family("llava", dtype=torch.bfloat16).model
    inputs = llava.inputs(BATCH, side="left", seed=12)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    generation_agreement(model, inputs, [Stride(keep=5, at=1)]).check()


def test_an_empty_cache_is_exchanged_and_others_refused(llava):
    model, inputs = llava.model, llava.inputs(ONE, seed=13)
    used = model(**inputs).past_key_values
    with vr.applied(model, SOME), torch.no_grad():
        mine = DynamicCache()
        assert model(**inputs, past_key_values=mine).past_key_values is mine
        assert isinstance(mine, PositionCache)
        assert mine.get_seq_length() == inputs["input_ids"].shape[1]
        with pytest.raises(ValueError, match=r"holds \d+ tokens that went through the unmodified model"):
            model(**inputs, past_key_values=used)
        with pytest.raises(NotImplementedError, match=r"^past_key_values is a EncoderDecoderCache; .*leave"):
            model(**inputs, past_key_values=EncoderDecoderCache(DynamicCache(), DynamicCache()))
        with pytest.raises(TypeError, match="expected a transformers Cache"):
            model(**inputs, past_key_values=())
    with pytest.raises(RuntimeError, match="filled by a rewritten model"):
        model(input_ids=torch.tensor([[9]]), past_key_values=mine)


def test_attentions_are_refused(llava, monkeypatch):
    model, inputs = llava.model, llava.inputs(ONE, seed=13)
    with vr.applied(model, SOME), torch.no_grad():
        with pytest.raises(NotImplementedError, match="output_attentions=True is not available"):
            model(**inputs, output_attentions=True)
        for config in (model.config, model.config.text_config):
            monkeypatch.setattr(config, "_output_attentions", True, raising=False)
            with pytest.raises(NotImplementedError, match=r"output_attentions=True \(in the config\)"):
                model(**inputs)
            assert model(**inputs, output_attentions=False).logits.shape[:2] == inputs["input_ids"].shape
            monkeypatch.undo()


def test_assisted_decoding(llava):
    model, inputs = llava.model, llava.inputs(ONE, seed=14)
    with vr.applied(model, SOME):
        expected = model.generate(**inputs, **GREEDY)
        got = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("rows", [[Row(1, 2, 0)], [Row(2, 0, 0), Row(0, 1, 3), Row(1, 4, 2)]])
def test_a_prompt_that_ends_in_an_image_keeps_its_last_token(llava, rows):
    for passes in ([STS(keep=3, refine=1, at=2)], [Stride(keep=20), Random(keep=1, at=3)]):
        generation_agreement(llava.model, llava.inputs(rows), passes).check()
        forward_agreement(llava.model, llava.inputs(rows, side="right"), passes).check()


UNSELECTIVE = [VISOR([0, 2], [1]), ViCA(cross=[0, 2]), VTW(at=2), ShortV(layers=0.5), DPVR(at=2, branch="identity")]


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize(("p", "chunk"), crossed(UNSELECTIVE, [16, 7]), ids=repr)
def test_prefill_in_chunks_is_prefill_at_once_where_nothing_is_selected(llava, p, chunk):
    inputs = llava.inputs([Row(2, 1, 3), Row(0, 4, 2), Row(3, 2, 1)], seed=1)
    options = {"max_new_tokens": 2, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with vr.applied(llava.model, [p]) as model:
        whole, parts = (model.generate(**inputs, **options, **c) for c in ({}, {"prefill_chunk_size": chunk}))
    torch.testing.assert_close(torch.stack(parts.logits), torch.stack(whole.logits), atol=1e-4, rtol=0)
