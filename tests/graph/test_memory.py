"""Predicted peak memory: counted on fake tensors, held against what PyTorch's allocator reports of the same call."""

from __future__ import annotations

import functools

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import vlmrewrite as vr
from vlmrewrite.bench.clock import peak_of
from vlmrewrite.cli.prompt import Shape, prompt_inputs
from vlmrewrite.lower.lowering import Executable, lower
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, FastV, Stride
from vlmrewrite.report.memory import LiveBytes, Tail, peak_bytes
from vlmrewrite.runtime import Layout
from vlmrewrite.testing.models import HIDDEN, ZOO, Row

CHAIN = [{"cross_layers": [0, 2]}, {"self_layers": [0], "cross_layers": [2]}, {"self_layers": [0, 1, 2, 3]}]
EACH = {
    "sts": [STS(keep=48, refine=16)],
    "fastv": [FastV(keep=48, at=1)],
    "dpvr": [DPVR(at=1)],
    "visor": [VISOR([0], [2])],
    "visor dispatch": [VISOR(policy="confidence", chain=CHAIN, threshold=1.0)],
    "rows on plans of their own": [VISOR(policy=lambda x: torch.tensor([1, 0, 2][: len(x)]), chain=CHAIN)],
    "dape": [DAPE(0.5)],
}


@functools.cache
def llava(dtype=torch.float32):
    torch.manual_seed(0)
    text = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=200,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, image_size=96, patch_size=8
    )
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=199, image_seq_length=144)
    return LlavaForConditionalGeneration(config).to(dtype).eval()


def allocated(run):
    """Result of a run, and the largest number of bytes that it held at a time, as the allocator reports them."""
    return peak_of(run, torch.device("cpu"))


@pytest.mark.wide
@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", EACH)
def test_prediction_is_what_the_allocator_reports(monkeypatch, name, rows):
    model, own, seen = llava(), Executable.run, {}
    inputs = prompt_inputs(model, Shape(144, text=16, rows=rows), as_list=True)

    def run(self, given, call):
        _ = call.counts, call.flat, call.text, call.last  # what the host keeps of a call is no part of its graph
        out, seen["after"] = allocated(lambda: own(self, given, call))
        graph = lower(self.program.captured).graph_module
        _, seen["before"] = allocated(lambda: graph(*given))
        return out

    monkeypatch.setattr(Executable, "run", run)
    with vr.applied(model, EACH[name]), torch.no_grad():
        model(**inputs, logits_to_keep=1)
        predicted = vr.report(model, memory=True).memory
    assert predicted == pytest.approx(seen, rel=0.05)


@pytest.mark.slow
def test_it_is_shown_and_can_be_saved():
    model = llava()
    inputs = prompt_inputs(model, Shape(144, text=16), as_list=True)
    with vr.applied(model, EACH["sts"]):
        with pytest.raises(ValueError, match="no call with an image"):
            vr.report(model, memory=True)
        model(**inputs)
        assert vr.report(model).to_dict()["memory"] == {}
        found = vr.report(model, memory=True)
    assert found.to_dict()["memory"] == found.memory and found.memory["after"] < found.memory["before"]
    assert "peak memory: " in str(found)


def test_views_and_what_was_there_count_nothing_and_what_is_gone_no_longer():
    given = torch.zeros(100)
    with LiveBytes() as live:
        x = given[:50].view(5, 10).t()
        assert live.now == 0
        y = x + 1
        z = y[1:]
        assert (live.now, live.peak) == (200, 200)
        del y
        assert live.now == 200
        w = z * 2
        del z
    assert (live.now, live.peak) == (180, 380)
    del w


def test_a_head_and_its_tails():
    class Head(torch.nn.Module):
        def forward(self, x):
            return x + 1, x + 2

    class Then(torch.nn.Module):
        def forward(self, x, y):
            z = x * y
            z = z * 2
            return z + 1

    head, tail = torch.fx.symbolic_trace(Head()), torch.fx.symbolic_trace(Then())
    x = Layout.of(torch.zeros(10))
    assert peak_bytes(head, [x]) == 80
    step = Tail(tail, [x], [1])
    assert peak_bytes(head, [x], [step]) == peak_bytes(head, [x], [step] * 3) == 80 + 80
    assert peak_bytes(head, [x._replace(device=torch.device("cuda"))]) == 2 * 512


@pytest.mark.slow
def test_it_is_that_of_the_call_whatever_is_cast_when_it_is_asked_for():
    model = llava()
    inputs = prompt_inputs(model, Shape(144, text=16), as_list=True)
    with vr.applied(model, EACH["sts"]), torch.no_grad():
        model(**inputs)
        plain = vr.report(model, memory=True).memory
        with torch.autocast("cpu", torch.bfloat16):
            assert vr.report(model, memory=True).memory == plain
            model(**inputs)
            cast = vr.report(model, memory=True).memory
        assert vr.report(model, memory=True).memory == cast != plain


@pytest.mark.slow
def test_features_that_are_added_again_where_a_mask_says():
    """How many that are is a number of the call: counted as all tokens, as much before as after."""
    tiny = ZOO["qwen3_vl"](layers=3)
    inputs = tiny.inputs([Row(1, 2, 3), Row(2, 1, 2)])
    with torch.no_grad(), vr.applied(tiny.model, [Stride(0.25)]):
        tiny.model(**inputs)
        memory = vr.report(tiny.model, memory=True).memory
    tokens, vision = inputs["input_ids"].numel(), int((inputs["input_ids"] == tiny.image_token_id).sum())
    assert tokens * HIDDEN * 4 < memory["after"] < memory["before"] - vision // 2 * HIDDEN * 4
