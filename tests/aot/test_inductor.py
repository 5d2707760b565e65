"""The inductor backend: one piece, the same tokens as eager, decode steps too."""

from __future__ import annotations

import functools
import gc
import shutil
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

import vlmrewrite as vr
from tests.small import long
from vlmrewrite.capture import CAPTURES
from vlmrewrite.passes import STS, Stride
from vlmrewrite.testing.agreement import generation_agreement
from vlmrewrite.testing.models import FAMILIES, Row

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler"
)
GREEDY = {"do_sample": False, "max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture
def quiet():
    """Without what Inductor and generate() warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def tiny(quiet, unshared):
    """A model of two layers, as every one is compiled; nothing is captured of another one like it."""
    return FAMILIES["llava"](layers=2)


@functools.cache
def of(name):
    """A model whose graphs all tests share that run them as they are."""
    return FAMILIES[name](layers=2)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("passes", [[STS(keep=6, refine=3, at=1)], [Stride(keep=5, at=1)]][: 1 + long()], ids=repr)
def test_generation_agrees_with_eager(tiny, passes):
    prompts = [tiny.inputs([Row(1, 2, 3), Row(2)]), tiny.inputs([Row(1, 4, 6), Row(2, 0, 1)], seed=1)]
    with vr.applied(tiny.model, passes, backend="eager"):
        expected = [tiny.model.generate(**p, **GREEDY) for p in prompts]
    counters.clear()
    with vr.applied(tiny.model, passes, backend="inductor"):
        got = [tiny.model.generate(**p, **GREEDY) for p in prompts]
        report = vr.report(tiny.model)
    assert not counters["graph_break"]
    assert report.backend == "inductor"
    assert "Inductor compiled 6 of the 6 calls without a new image" in " ".join(report.notes)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.sequences, b.sequences)
        torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), atol=1e-4, rtol=1e-4)
        assert a.past_key_values.kv_lengths() == b.past_key_values.kv_lengths()
    assert (len(CAPTURES[tiny.model].call.graphs), len(CAPTURES[tiny.model].text.graphs)) == (1, 1)
    assert counters["stats"]["unique_graphs"] == 3  # captured for decoding, and compiled for both


@pytest.mark.slow
@needs_compiler
def test_first_calls_of_two_threads_at_once(quiet, unshared):
    tiny, twin = FAMILIES["llava"](layers=1), FAMILIES["llava"](layers=1)
    inputs = [tiny.inputs([Row(1, 2, 3)]), tiny.inputs([Row(0, 0, 6)])]
    twin.model.load_state_dict(tiny.model.state_dict())

    def logits(x, model=tiny.model):
        with torch.no_grad():
            return model(**x).logits

    with vr.applied(twin.model, [Stride(keep=5)], backend="eager"):
        expected = [logits(x, twin.model) for x in inputs]
    counters.clear()
    with vr.applied(tiny.model, [Stride(keep=5)], backend="inductor"), ThreadPoolExecutor(2) as threads:
        for got, want in zip(threads.map(logits, inputs), expected, strict=True):
            torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 3  # the twin has captured that of images


EACH = FAMILIES if long() else ("llava", "qwen2_5_vl", "gemma3")


@pytest.mark.wide
@pytest.mark.parametrize(("name", "side"), [("llava", "right"), *((name, "left") for name in EACH)])
def test_graphs_of_decode_steps_agree_with_the_oracle(as_they_are, quiet, name, side):
    tiny = of(name)
    for rows in ([Row(1, 2, 3)], [Row(2, 1, 2), Row(0, 4, 2), Row(1, 3, 4)]):
        if len(rows) > 1 or name == "llava" or long():
            inputs = tiny.inputs(rows, side=side)
            generation_agreement(tiny.model, inputs, [STS(keep=3, refine=2, at=1)], backend="inductor").check()


def test_graphs_over_empty_slots_without_padding(as_they_are, quiet):
    """Rows of one length that keep different numbers of tokens."""
    tiny = of("llava")
    inputs = tiny.inputs([Row(2, 1, 2), Row(1, 10, 10)])
    assert inputs["attention_mask"].all()
    generation_agreement(tiny.model, inputs, [STS(keep=3, refine=2, at=1)], backend="inductor").check()


@pytest.mark.slow
def test_graphs_of_padded_rows_beams_and_a_further_turn(as_they_are, quiet):
    """Decode steps over caches with empty slots, reordered and cropped."""
    tiny = of("llava")
    inputs = tiny.inputs([Row(2, 1, 2), Row(0, 4, 2), Row(1, 3, 4)], side="left")
    one, text = tiny.inputs([Row(1)]), tiny.inputs([Row(0, 4, 4), Row(0, 1, 2)], side="left")
    more = torch.tensor([[9, 10, 11]] * 3)
    results = []
    for backend in ("eager", "inductor"):
        with vr.applied(tiny.model, [STS(keep=6, refine=3, at=1)], backend=backend):
            out = tiny.model.generate(**inputs, **GREEDY)
            ids = torch.cat([out.sequences, more], 1)
            mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - inputs["input_ids"].shape[1]),
                                           value=1)  # fmt: skip
            again = tiny.model.generate(ids, attention_mask=mask, past_key_values=out.past_key_values, **GREEDY)
            beams = tiny.model.generate(**inputs, **{**GREEDY, "num_beams": 2})
            looked_up = tiny.model.generate(**one, **GREEDY, prompt_lookup_num_tokens=2)
            plain = tiny.model.generate(**text, **GREEDY)
        results.append((out, again, beams, looked_up, plain))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.sequences, b.sequences)
        torch.testing.assert_close(torch.stack(a.logits), torch.stack(b.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@needs_compiler
def test_what_was_compiled_dies_with_the_model(quiet):
    tiny = FAMILIES["llava"](layers=1)
    with vr.applied(tiny.model, [Stride(keep=5)], backend="inductor"):
        tiny.model.generate(**tiny.inputs([Row(1)]), max_new_tokens=2)
    refs = [weakref.ref(x) for x in (tiny.model, next(tiny.model.parameters()), CAPTURES[tiny.model])]
    del tiny
    gc.collect()
    gc.collect()
    assert [type(r()).__name__ for r in refs if r() is not None] == []
