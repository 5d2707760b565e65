"""What two calls, two models or two rows must not see of one another: prompts, configs, images that are not finite."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import vlmrewrite as vr
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, VTW, DivPrune, FastV, Random, ShortV, Stride, ViCA
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
def test_a_generation_inside_a_generation_is_as_outside(llava):
    model, outer, inner = llava.model, llava.inputs([Row(1, 2, 3)], seed=1), llava.inputs([Row(2, 1, 9)], seed=2)
    how = {"do_sample": False, "max_new_tokens": 2, "use_cache": False}
    with vr.applied(model, [FastV(keep=2, at=1)]):
        alone, expected = model.generate(**inner, **how), model.generate(**outer, **how)
        processor = Inside(lambda: model.generate(**inner, **how))
        got = model.generate(**outer, **how, logits_processor=LogitsProcessorList([processor]))
    assert torch.equal(got, expected)
    assert all(torch.equal(x, alone) for x in processor.results)


# ---- a config that two models share


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


@torch.no_grad()
def test_a_recipe_that_cannot_do_its_work_in_a_call_says_so_once(qwen):
    inputs = qwen.inputs([Row(1, 1, 2)], seed=3)
    encoded = qwen.model.model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    hidden = {k: v for k, v in inputs.items() if k not in ("pixel_values", "image_grid_thw")}
    hidden["mm_encoder_outputs"] = {"image": encoded}
    with vr.applied(qwen.model, [DAPE(budget=0.5)]):
        with pytest.warns(UserWarning, match=r"recipe 'custom': DAPE\(.*\) does nothing: .*image_grid_thw"):
            qwen.model(**hidden)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            qwen.model(**hidden)
            qwen.model(**inputs)


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
