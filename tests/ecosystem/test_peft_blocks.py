"""Adapters of PEFT beside trained blocks: which of them learn, and both saved, loaded, copied and merged together."""

from __future__ import annotations

import copy

import pytest
import torch

import vlmrewrite as vr
from tests.small import losses
from vlmrewrite.passes import DPVR, STS
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.testing.agreement import generation_agreement
from vlmrewrite.testing.models import FAMILIES, Row

peft = pytest.importorskip("peft")
ROWS = [Row(1, 3, 2), Row(2, 1, 3)]
RECIPE = [STS(keep=5, refine=3, at=1), DPVR(at=2)]


def config(targets="all-linear", **how):
    return peft.LoraConfig(r=4, target_modules=targets, **({"init_lora_weights": False} | how))


def learning(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def of_blocks(names):
    return {name for name in names if ATTRIBUTE in name}


def steps(model, inputs):
    """Some steps of descent, in which adapters and blocks change, and the loss falls."""
    some = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in some.items()}
    seen = losses(model, inputs, some.values(), 0.05, 4)
    assert seen[-1] < seen[0]
    for kind in (ATTRIBUTE, ".model.language_model.layers.3."):
        assert any(not torch.equal(p, before[name]) for name, p in some.items() if kind in name)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=["all", "by name"])
def test_no_adapter_is_put_into_the_blocks(targets):
    tiny = FAMILIES["llava"](layers=4)
    inputs = tiny.inputs(ROWS, side="left")
    vr.apply(tiny.model, RECIPE)
    before = [name for name, _ in tiny.model.vlmrewrite_blocks.named_parameters()]
    model = peft.get_peft_model(tiny.model, config(targets))
    assert [name for name, _ in tiny.model.vlmrewrite_blocks.named_parameters()] == before
    assert vr.verify(model, inputs) < 1e-4
    vr.restore(model)
    assert all("lora_" in name for name in learning(model))
    generation_agreement(model, inputs, RECIPE).check()


def test_blocks_learn_beside_adapters_that_were_there_first():
    tiny = FAMILIES["llava"](layers=4)
    model, inputs = peft.get_peft_model(tiny.model, config()), tiny.inputs(ROWS)
    before = learning(model)
    vr.apply(model, RECIPE)
    added = of_blocks(learning(model))
    assert added and learning(model) == before | added
    assert not any("lora_" in name for name in added), "the copy starts as what the adapted layer does"
    assert vr.verify(model, inputs) < 1e-4
    steps(model, inputs)
    vr.restore(model)
    assert learning(model) == before


def test_both_are_saved_and_loaded_apart(tmp_path):
    tiny = FAMILIES["llava"](layers=4)
    tiny.model.save_pretrained(tmp_path / "base")
    inputs = tiny.inputs(ROWS)
    base = type(tiny.model).from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, config())
    vr.apply(model, RECIPE)
    steps(model, inputs)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "both")
    vr.save_blocks(model, tmp_path / "both")
    other = peft.PeftModel.from_pretrained(type(base).from_pretrained(tmp_path / "base"), tmp_path / "both")
    assert vr.load_blocks(other, tmp_path / "both") is other
    assert torch.equal(other(**inputs).logits, expected)
    assert torch.equal(vr.from_pretrained(tmp_path / "both")(**inputs).logits, expected)


@pytest.fixture(scope="module")
def together():
    """A rewritten model whose blocks PEFT trains and keeps as one of its own, trained."""
    tiny = FAMILIES["llava"](layers=4)
    inputs = tiny.inputs(ROWS)
    vr.apply(tiny.model, RECIPE)
    model = peft.get_peft_model(tiny.model, config(modules_to_save=[ATTRIBUTE]))
    model.eval()
    steps(model, inputs)
    return model, inputs


def test_blocks_that_peft_keeps_are_those_that_run(together):
    model, inputs = together
    held = model.get_base_model().vlmrewrite_blocks
    first, kept = held.original_module.state_dict(), held.modules_to_save["default"].state_dict()
    assert any(not torch.equal(first[name], kept[name]) for name in first)
    assert {name.rpartition("default.")[2] for name in of_blocks(learning(model))} == {*kept}
    assert vr.verify(model, inputs) < 1e-4
    tuned = model(**inputs).logits
    with model.disable_adapter():
        plain = model(**inputs).logits
        assert vr.verify(model, inputs) < 1e-4
    assert (plain - tuned).abs().max() > 0.01
    other = FAMILIES["llava"](layers=4).model
    vr.apply(other, RECIPE)
    torch.testing.assert_close(other(**inputs).logits, plain, atol=1e-5, rtol=0)
    assert torch.equal(model(**inputs).logits, tuned)


def test_peft_saves_and_loads_both(together, tmp_path):
    model, inputs = together
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    other = FAMILIES["llava"](layers=4).model
    vr.apply(other, RECIPE)
    assert torch.equal(peft.PeftModel.from_pretrained(other, tmp_path)(**inputs).logits, expected)


def test_what_vlmrewrite_saves_are_the_blocks_that_run(together, tmp_path):
    model = together[0]
    vr.save_blocks(model, tmp_path)
    kept = model.get_base_model().vlmrewrite_blocks.modules_to_save["default"].state_dict()
    other = FAMILIES["llava"](layers=4).model
    vr.load_blocks(other, tmp_path)
    assert all(torch.equal(t, kept[name]) for name, t in other.vlmrewrite_blocks.state_dict().items())


def test_a_copy_of_both(together):
    model, inputs = together
    made = copy.deepcopy(model)
    assert learning(made) == learning(model)
    assert torch.equal(made(**inputs).logits, model(**inputs).logits)
    steps(made, inputs)
    assert not torch.equal(made(**inputs).logits, model(**inputs).logits)


def test_adapters_are_merged_and_the_blocks_stay(together):
    model, inputs = together
    expected = model(**inputs).logits
    made = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(made(**inputs).logits, expected, atol=1e-4, rtol=0)
    assert vr.verify(made, inputs) < 1e-4
    vr.restore(made)
    assert not hasattr(made, ATTRIBUTE)


def test_restoring_leaves_the_adapters_learning(together):
    made = copy.deepcopy(together[0])
    expected = {name for name in learning(made) if ATTRIBUTE not in name}
    vr.restore(made)
    assert learning(made) == expected
