"""Rewritten models with their operators as Triton kernels, in the interpreter, against the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmrewrite as vr
from tests.small import batches, family, long
from vlmrewrite.lower.lowering import lower
from vlmrewrite.ops import device
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, DivPrune, FastV, Stride
from vlmrewrite.testing import strategies
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import Row

NAMES = ["llava", "llava_qwen2", "gemma3", "qwen2_5_vl"]
ROWS = [Row(1, 2, 3), Row(2, 0, 1), Row(0, 4, 2)]
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
    "llava": ["sts", "divprune", "dape", "dpvr"],
    "gemma3": ["visor"],
    "qwen2_5_vl": ["fastv", "sts then visor"],
}
EACH_OF = dict.fromkeys(NAMES, EACH) if long() else SOME


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize(("name", "passes"), [(n, p) for n in EACH_OF for p in EACH_OF[n]])
def test_generation_by_kernels_agrees_with_the_oracle(name, passes):
    tiny = family(name)
    inputs = tiny.inputs(ROWS)
    generation_agreement(tiny.model, inputs, EACH[passes], 3, kernels="triton").check()


@pytest.mark.slow
@settings(max_examples=200 if long() else 4)
@given(st.data(), st.sampled_from(NAMES if long() else ["llava"]), batches(), strategies.sides(), st.integers(0, 9))
def test_compositions_by_kernels_agree_with_the_oracle(data, name, rows, side, seed):
    tiny = family(name)
    passes = data.draw(strategies.techniques(4))
    inputs = tiny.inputs(rows, side=side, seed=seed)
    forward_agreement(tiny.model, inputs, passes, kernels="triton", strict=False).check()


@torch.no_grad()
def test_the_report_says_what_each_operator_became_and_why():
    tiny = family("llava")
    with vr.applied(tiny.model, EACH["sts"], kernels="triton"):
        tiny.model(**tiny.inputs(ROWS))
        made = vr.report(tiny.model).to_dict()["kernels"]
    for name in ("sts_sample", "top_attention", "attention_received", "select", "restore"):
        assert [x["kernel"] for x in made[name]] == ["triton"], name
        assert "interpreter" in made[name][0]["why"]
    assert "no kernel" in made["token_index"][0]["why"]


@torch.no_grad()
def test_selections_of_one_set_are_one_launch():
    tiny = family("llava")
    program = vr.rewrite(vr.trace(tiny.model, tiny.inputs(ROWS)), [Stride(keep=2)])
    before = [n for n in program.graph_module.graph.nodes if n.target is torch.ops.vlm.select.default]
    low = lower(program.graph_module, "triton")
    after = [n for n in low.graph_module.graph.nodes if n.target is torch.ops.vlm_triton.gather.default]
    assert len(before) >= 3
    assert len(after) == len({n.args[1] for n in before})


@torch.no_grad()
def test_auto_takes_kernels_on_a_gpu_only():
    tiny = family("llava")
    with vr.applied(tiny.model, EACH["sts"]):
        tiny.model(**tiny.inputs(ROWS))
        made = vr.report(tiny.model).to_dict()["kernels"]
    if not torch.cuda.is_available():
        assert {x["kernel"] for entries in made.values() for x in entries} == {"reference"}
        assert "the model is on cpu" in made["restore"][0]["why"]


def test_kernels_asked_for_by_name_run_or_raise(monkeypatch):
    tiny = family("llava")
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


@torch.no_grad()
def test_what_the_attention_kernel_does_not_take_is_an_error_by_name():
    tiny = family("llava", layers=2, dtype=torch.float64)
    inputs = tiny.inputs(ROWS)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with (
        vr.applied(tiny.model, EACH["sts"], kernels="triton"),
        pytest.raises(RuntimeError, match="its dtype is float64"),
    ):
        tiny.model(**inputs)
