"""Adapters of PEFT: put on before or after a recipe, switched while it is applied, trained under it."""

from __future__ import annotations

import pytest
import torch

import vlmrewrite as vr
from tests.ecosystem.test_quantised import quantised
from tests.small import losses
from vlmrewrite.passes import STS, Stride
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import FAMILIES, Row

peft = pytest.importorskip("peft")
ROWS = [Row(1, 3, 2), Row(2, 1, 3)]
GREEDY = {"do_sample": False, "max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
SOME = STS(keep=5, refine=3, at=1)


def config(**how):
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **({"init_lora_weights": False} | how))


def test_a_recipe_on_an_adapted_model_agrees_with_the_oracle():
    tiny = FAMILIES["llava"](layers=4)
    model = peft.get_peft_model(tiny.model, config())
    inputs = tiny.inputs(ROWS, side="left")
    forward_agreement(model, inputs, SOME).check()
    generation_agreement(model, inputs, SOME).check()
    assert vr.apply(model, SOME) is model
    assert isinstance(model, peft.PeftModel)
    with pytest.raises(ValueError, match="is applied to this LlavaForConditionalGeneration already"):
        vr.apply(model, SOME)
    model.generate(**inputs, **GREEDY)
    assert "sts" in str(vr.report(model))
    assert vr.restore(model) is model


def test_an_adapter_on_a_rewritten_model_is_seen():
    tiny = FAMILIES["llava"](layers=4)
    inputs = tiny.inputs(ROWS, side="left")
    vr.apply(tiny.model, Stride(keep=1_000_000))
    before = tiny.model.generate(**inputs, **GREEDY).logits[0]
    model = peft.get_peft_model(tiny.model, config())
    got = model.generate(**inputs, **GREEDY)
    vr.restore(model)
    expected = model.generate(**inputs, **GREEDY)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.logits[0], expected.logits[0], atol=1e-4, rtol=0)
    assert (got.logits[0] - before).abs().max() > 0.01


def test_adapters_are_switched_and_nothing_is_captured_twice():
    tiny = FAMILIES["llava"](layers=4)
    model = peft.get_peft_model(tiny.model, config())
    model.add_adapter("second", config())
    inputs = tiny.inputs(ROWS, side="left")

    def each():
        for name in ("default", "second"):
            model.set_adapter(name)
            yield model.generate(**inputs, **GREEDY).logits[0]
        with model.disable_adapter():
            yield model.generate(**inputs, **GREEDY).logits[0]

    expected = [*each()]
    with vr.applied(model, Stride(keep=1_000_000)):
        got, graphs = [*each()], vr.report(model).graphs["captured"]
        again = [*each()]
        assert vr.report(model).graphs["captured"] == graphs == 3
    for a, b, c in zip(expected, got, again, strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=0)
        assert torch.equal(b, c)
    assert (expected[0] - expected[1]).abs().max() > 0.01


def test_an_adapter_is_trained_under_a_recipe():
    tiny = FAMILIES["llava"](layers=4)
    model = peft.get_peft_model(tiny.model, config(init_lora_weights=True))
    inputs = tiny.inputs(ROWS)
    vr.apply(model, SOME)
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert learning
    assert all("lora_" in name for name in learning)
    seen = losses(model, inputs, learning.values(), 0.1, 4)
    assert seen[-1] < seen[0]


def test_adapters_on_four_bits_agree_with_the_oracle():
    """That they are trained is tested in test_qlora.py."""
    pytest.importorskip("bitsandbytes")
    tiny = quantised("bitsandbytes, 4 bits")
    model = peft.get_peft_model(tiny.model, config())
    generation_agreement(model, tiny.inputs(ROWS, side="left"), SOME).check()
