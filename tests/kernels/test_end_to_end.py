"""Rewritten models with their operators as Triton kernels, in the interpreter, against the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmrewrite as vr
from tests.small import family
from vlmrewrite.lower.lowering import lower
from vlmrewrite.ops import device
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, DivPrune, FastV, Stride
from vlmrewrite.testing import strategies
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import FAMILIES, Row

MODELS = {name: family(name) for name in ("llava", "llava_qwen2", "gemma3", "qwen2_5_vl")}
EACH = {
    "sts": [STS(keep=4, refine=2)],
    "fastv": [FastV(keep=3, at=1)],
    "divprune": [DivPrune(keep=3)],
    "dpvr": [DPVR(at=1)],
    "visor": [VISOR([0], [2])],
    "dape": [DAPE(0.5)],
    "sts then visor": [STS(keep=5, refine=None), VISOR([0, 1], [3])],
}


SOME = {
    "llava": ["sts", "divprune", "dape"],
    "llava_qwen2": ["dpvr"],
    "gemma3": ["visor"],
    "qwen2_5_vl": ["fastv", "sts then visor"],
}
LONG = settings.get_current_profile_name() == "long"


@pytest.mark.parametrize(("name", "passes"), [(n, p) for n in MODELS for p in (EACH if LONG else SOME[n])])
def test_generation_by_kernels_agrees_with_the_oracle(name, passes):
    tiny = MODELS[name]
    inputs = tiny.inputs([Row(1, 2, 3), Row(2, 0, 1), Row(0, 4, 2)])
    generation_agreement(tiny.model, inputs, EACH[passes], 3, kernels="triton").check()


@settings(max_examples=200 if LONG else 4)
@given(st.data(), st.sampled_from(sorted(MODELS)), strategies.rows(), strategies.sides(), st.integers(0, 9))
def test_compositions_by_kernels_agree_with_the_oracle(data, name, rows, side, seed):
    tiny = MODELS[name]
    passes = data.draw(strategies.techniques(4))
    inputs = tiny.inputs(rows, side=side, seed=seed)
    forward_agreement(tiny.model, inputs, passes, kernels="triton", strict=False).check()


def test_the_report_says_what_each_operator_became_and_why():
    tiny = MODELS["llava"]
    with vr.applied(tiny.model, EACH["sts"], kernels="triton"):
        tiny.model(**tiny.inputs([Row(1), Row(2)]))
        made = vr.report(tiny.model).to_dict()["kernels"]
    for name in ("sts_sample", "top_attention", "attention_received", "select", "restore"):
        assert [x["kernel"] for x in made[name]] == ["triton"], name
        assert "interpreter" in made[name][0]["why"]
    assert "no kernel" in made["token_index"][0]["why"]


def test_selections_of_one_set_are_one_launch():
    tiny = MODELS["llava"]
    program = vr.rewrite(vr.trace(tiny.model, tiny.inputs([Row(1), Row(1)])), [Stride(keep=2)])
    before = [n for n in program.graph_module.graph.nodes if n.target is torch.ops.vlm.select.default]
    low = lower(program.graph_module, "triton")
    after = [n for n in low.graph_module.graph.nodes if n.target is torch.ops.vlm_triton.gather.default]
    assert len(before) >= 3
    assert len(after) == len({n.args[1] for n in before})


def test_auto_takes_kernels_on_a_gpu_only():
    tiny = MODELS["llava"]
    with vr.applied(tiny.model, EACH["sts"]):
        tiny.model(**tiny.inputs([Row(1)]))
        made = vr.report(tiny.model).to_dict()["kernels"]
    if not torch.cuda.is_available():
        assert {x["kernel"] for entries in made.values() for x in entries} == {"reference"}
        assert "the model is on cpu" in made["restore"][0]["why"]


def test_kernels_asked_for_by_name_run_or_raise(monkeypatch):
    tiny = MODELS["llava"]
    if torch.cuda.is_available():
        pytest.skip("the kernels run here")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert not device.interpreted()
    with pytest.raises(RuntimeError, match="kernels='triton' was asked for, and the model is on cpu"):
        vr.apply(tiny.model, EACH["sts"], kernels="triton")


def test_a_kernel_that_cannot_run_where_its_tensors_are_raises(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the kernels run here")
    monkeypatch.delenv("TRITON_INTERPRET")
    x, index = torch.randn(2, 5, 8), torch.tensor([[0, 2], [1, 4]])
    with pytest.raises(RuntimeError, match=r"vlm_triton::gather cannot run on cpu: .*expected a graph lowered for it"):
        torch.ops.vlm_triton.gather([x], [1], index)


def test_what_the_attention_kernel_does_not_take_is_an_error_by_name():
    tiny = FAMILIES["llava"]()
    tiny.model.double()
    inputs = tiny.inputs([Row(1), Row(2)])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    vr.apply(tiny.model, EACH["sts"], kernels="triton")
    with pytest.raises(RuntimeError, match="its dtype is float64"):
        tiny.model(**inputs)
