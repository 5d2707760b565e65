"""What two calls, two models or two rows must not see of one another: prompts, configs, images that are not finite."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import vlmrewrite as vr
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, VTW, DivPrune, FastV, Random, ShortV, Stride, ViCA
from vlmrewrite.runtime import prompt_ends
from vlmrewrite.testing.models import FAMILIES, Row


@pytest.fixture(scope="module")
def llava():
    return FAMILIES["llava"](layers=4)


@pytest.fixture(scope="module")
def qwen():
    return FAMILIES["qwen2_5_vl"](layers=4)


# ---- a call inside another


class Inside(LogitsProcessor):
    """Makes a call while generate() runs."""

    def __init__(self, call):
        self.call, self.results = call, []

    def __call__(self, ids, scores):
        self.results.append(self.call())
        return scores


@pytest.mark.wide
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("recipe", [[FastV(keep=2, at=1)], [STS(keep=6, refine=2, at=1)], [DAPE(budget=0.5)]])
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_a_forward_inside_a_generation_is_as_outside(request, family, recipe):
    tiny = request.getfixturevalue(family)
    model, outer, inner = tiny.model, tiny.inputs([Row(1, 2, 3)], seed=1), tiny.inputs([Row(1, 2, 9)], seed=2)

    def call():
        return model(**inner).logits, [s.vision for s in vr.kept_tokens(model)]

    with vr.applied(model, recipe):
        logits, kept = call()
        generated = model.generate(**outer, do_sample=False, max_new_tokens=3)
        processor = Inside(call)
        again = model.generate(
            **outer, do_sample=False, max_new_tokens=3, logits_processor=LogitsProcessorList([processor])
        )
    assert torch.equal(again, generated)
    assert len(processor.results) == 3
    for got, what in processor.results:
        torch.testing.assert_close(got, logits)
        assert all(map(torch.equal, what, kept))


@torch.no_grad()
@pytest.mark.parametrize("call", ["generate", "forward", "get_image_features"])
@pytest.mark.parametrize("recipe", [[FastV(keep=2, at=1)], [STS(keep=6, refine=2, at=1, features="encoder")]])
def test_a_call_inside_a_generation_without_a_cache_is_as_outside(llava, recipe, call):
    model, outer, inner = llava.model, llava.inputs([Row(1, 2, 3)], seed=1), llava.inputs([Row(2, 1, 9)], seed=2)
    how = {"do_sample": False, "max_new_tokens": 2, "use_cache": False}
    calls = {
        "generate": lambda: model.generate(**inner, **how),
        "forward": lambda: model(**inner).logits,
        "get_image_features": lambda: model.model.get_image_features(inner["pixel_values"]).pooler_output,
    }
    with vr.applied(model, recipe):
        alone, expected = calls[call](), model.generate(**outer, **how)
        processor = Inside(calls[call])
        got = model.generate(**outer, **how, logits_processor=LogitsProcessorList([processor]))
    assert torch.equal(got, expected)
    assert len(processor.results) == 2
    for found in processor.results:
        torch.testing.assert_close(found, alone)


# ---- where a prompt ends, however it is given


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_a_prompt_ends_where_it_ends_however_it_is_given(llava, cache):
    inputs = llava.inputs([Row(1, 2, 3), Row(1, 2, 5)], side="left", seed=1)
    how = {"do_sample": False, "max_new_tokens": 6, "use_cache": cache}
    ids, rest = inputs["input_ids"], {k: v for k, v in inputs.items() if k != "input_ids"}
    with vr.applied(llava.model, [FastV(keep=2, at=1)]):
        tokens = llava.model.generate(**inputs, **how)
        kept = [s.vision[:, : ids.shape[1]] for s in vr.kept_tokens(llava.model)]
        for args, kwargs in [((ids,), {}), ((), {"inputs": ids}), ((None,), {"input_ids": ids})]:
            assert torch.equal(llava.model.generate(*args, **kwargs, **rest, **how), tokens)
            for got, expected in zip(vr.kept_tokens(llava.model), kept, strict=True):
                assert torch.equal(got.vision[:, : ids.shape[1]], expected)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_without_a_mask_padding_is_none_of_the_prompt(llava, cache, beams):
    model = llava.model
    inputs = llava.inputs([Row(1, 2, 3), Row(1, 2, 5)], side="right", seed=1)
    how = {"do_sample": False, "max_new_tokens": 3, "use_cache": cache, "num_beams": beams, "pad_token_id": 0}
    mask = inputs.pop("attention_mask")
    inputs["input_ids"][mask == 0] = 0
    assert torch.equal((inputs["input_ids"] != 0).long(), mask), "a token of the prompt is the padding token"
    kept = []
    with vr.applied(model, [FastV(keep=2, at=1)]):
        for more in ({"attention_mask": mask}, {}):
            tokens = model.generate(**inputs, **more, **how, eos_token_id=1)
            kept.append((tokens, [s.vision for s in vr.kept_tokens(model)]))
    assert torch.equal(kept[0][0], kept[1][0])
    assert all(map(torch.equal, kept[0][1], kept[1][1]))


@pytest.mark.slow
@torch.no_grad()
def test_prompt_ends_of_no_prompt(llava):
    inputs = llava.inputs([Row(1, 2, 3), Row(1, 2, 3)])
    with vr.applied(llava.model, [FastV(keep=2, at=1)]):
        for wrong in (torch.tensor([[20, 20]]), torch.tensor([-1, 20]), torch.tensor([1.0, 2.0])):
            with pytest.raises(ValueError, match="expected a column of each row"), prompt_ends(llava.model, wrong):
                pass
        with (
            prompt_ends(llava.model, torch.tensor([20, 20, 20])),
            pytest.raises(ValueError, match="ends of 3 prompts were given for a call of 2 rows"),
        ):
            llava.model(**inputs)


# ---- a decoder that two models share


@torch.no_grad()
def test_of_two_models_with_one_decoder_one_can_be_rewritten(llava):
    tiny = FAMILIES["llava"](layers=3)
    model, inputs = tiny.model, tiny.inputs([Row(1, 2, 3)])
    other = type(model)(model.config).eval()
    other.model.language_model = model.model.language_model
    before = [f(**inputs).logits for f in (model, other)]
    with vr.applied(model, [Stride(keep=4)]):
        with pytest.raises(ValueError, match="another model, that a recipe is applied to, has modules of this"):
            vr.apply(other, [Stride(keep=4)])
        assert torch.equal(other(**inputs).logits, before[1])
    with vr.applied(other, [Stride(keep=4)]), pytest.raises(ValueError, match="another model"):
        vr.apply(model, [Stride(keep=4)])
    assert all(torch.equal(f(**inputs).logits, x) for f, x in zip((model, other), before, strict=True))
    implementations = {m.config._attn_implementation for m in model.get_decoder().modules() if hasattr(m, "config")}
    assert implementations == {"sdpa"}


# ---- a config that two models share


@pytest.mark.slow
@torch.no_grad()
def test_a_second_model_of_the_same_config_is_not_touched(llava):
    model, inputs, how = llava.model, llava.inputs([Row(1, 2, 3), Row(1, 5, 4)]), {"max_new_tokens": 4}
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    other.generation_config = model.generation_config
    config, logits = model.config, other(**inputs).logits
    tokens = other.generate(**inputs, do_sample=False, **how)
    with vr.applied(model, [Stride(keep=4)]):
        rewritten = model.generate(**inputs, do_sample=False, **how)
        assert model.config is other.config is config
        assert config.get_text_config()._attn_implementation == "sdpa"
        assert torch.equal(other(**inputs).logits, logits)
        assert torch.equal(other.generate(**inputs, do_sample=False, **how), tokens)
        with vr.applied(other, [Stride(keep=4)]):
            assert torch.equal(other.generate(**inputs, do_sample=False, **how), rewritten)
            assert vr.verify(model, inputs) < 1e-4
        assert torch.equal(other(**inputs).logits, logits)
    assert torch.equal(model(**inputs).logits, logits)
    assert all(m.config is config.text_config for m in model.get_decoder().modules() if hasattr(m, "config"))


# ---- several sequences of a prompt


@pytest.mark.wide
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "how",
    [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=["beams", "sequences", "both"],
)
@pytest.mark.parametrize("rows", [[Row(2, 1, 2)], [Row(1, 1, 2), Row(3, 2, 1), Row(0, 0, 4)]], ids=["one", "three"])
def test_every_copy_of_a_row_keeps_what_the_row_keeps_alone(qwen, rows, how):
    model, inputs = qwen.model, qwen.inputs(rows, seed=3, side="left")
    with vr.applied(model, [DAPE(budget=0.5)], strict=True):
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        alone = [s.vision for s in vr.kept_tokens(model)]
        model.generate(**inputs, max_new_tokens=2, **how)
        copies = how.get("num_beams", how.get("num_return_sequences"))
        for got, expected in zip(vr.kept_tokens(model), alone, strict=True):
            assert torch.equal(got.vision, expected.repeat_interleave(copies, 0))


@pytest.mark.slow
@torch.no_grad()
def test_a_recipe_that_cannot_do_its_work_in_a_call_says_so_once(qwen):
    inputs = qwen.inputs([Row(1, 1, 2)], seed=3)
    encoded = qwen.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    hidden = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_grid_thw")}
    hidden["mm_encoder_outputs"] = {"image": encoded}
    with vr.applied(qwen.model, [DAPE(budget=0.5)]):
        with pytest.warns(UserWarning, match=r"'custom': DAPE\(.*\) does nothing: .* no input tells the images' size"):
            qwen.model(**hidden)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            qwen.model(**hidden)
            assert [bool(s.vision.sum() == len(encoded.pooler_output[0])) for s in vr.kept_tokens(qwen.model)] == [True]
            qwen.model(**inputs)
            assert vr.kept_tokens(qwen.model)[0].vision.sum() < len(encoded.pooler_output[0])


@torch.no_grad()
def test_a_call_that_has_what_an_earlier_one_lacked_is_rewritten(llava):
    inputs = llava.inputs([Row(1, 1, 2)], seed=3)
    encoded = llava.model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    hidden = {k: v for k, v in inputs.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": encoded}}
    kept = []
    with vr.applied(llava.model, [STS(keep=3, refine=None, features="encoder")]) as model:
        with pytest.warns(UserWarning, match="does nothing: (the images were given encoded|no image was encoded yet)"):
            model(**hidden)
        for given in (hidden, inputs):
            model(**given)
            kept.append(int(vr.kept_tokens(model)[0].vision.sum()))
    assert kept == [len(encoded.pooler_output[0]), 3]


# ---- an image that encodes to something that is not finite

PASSES = {
    "stride": [Stride(keep=4)],
    "random": [Random(keep=4)],
    "sts": [STS(keep=6, refine=3, at=2)],
    "sts, encoder": [STS(keep=6, refine=3, at=2, features="encoder")],
    "fastv": [FastV(keep=3, at=1)],
    "divprune": [DivPrune(keep=4)],
    "vtw": [VTW(at=2)],
    "shortv": [ShortV(layers=[1, 2])],
    "vica": [ViCA(cross=[1])],
    "dpvr": [DPVR(at=2, fuse=1)],
    "visor": [VISOR(self_layers=[0], cross_layers=[2])],
    "confidence": [VISOR(policy="confidence", chain=[{"self_layers": [0]}, {"self_layers": [0, 1]}])],
    "dape": [DAPE(budget=0.5)],
}


@pytest.mark.slow
@pytest.mark.wide
@torch.no_grad()
@pytest.mark.parametrize("name", PASSES)
def test_one_row_that_is_not_finite_leaves_the_others_as_they_are(llava, name):
    inputs = llava.inputs([Row(1, 2, 3), Row(1, 2, 3)])
    with vr.applied(llava.model, PASSES[name]):
        expected = llava.model(**inputs).logits[1]
        for bad in (float("nan"), float("inf")):
            for where in (slice(None), slice(0, 4)):
                pixels = inputs["pixel_values"].clone()
                pixels[0, :, where, where] = bad
                got = llava.model(**inputs | {"pixel_values": pixels}).logits
                torch.testing.assert_close(got[1], expected, atol=1e-5, rtol=1e-5)
