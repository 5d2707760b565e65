"""Reports: before and after a call, as text, as data, as HTML."""

from __future__ import annotations

import json

import pytest
import torch

import vlmrewrite as vr
from vlmrewrite.passes import STS, Random, Stride
from vlmrewrite.report import summary
from vlmrewrite.testing.models import Row

ONE = [Row(1, 2, 3)]


def test_before_any_call(llava):
    with vr.applied(llava.model, "sts-half"):
        report = vr.report(llava.model)
        assert report.to_dict()["passes"][0]["matched"] is None
        assert "not tried yet" in str(report)
        assert "sts-half" in report._repr_html_()
        with pytest.raises(ValueError, match="no call with an image was made"):
            vr.kept_tokens(llava.model)


@pytest.mark.slow
def test_after_a_call(llava):
    inputs = llava.inputs([Row(1, 2, 3), Row(1, 2, 3)])
    n = int((inputs["input_ids"] == llava.image_token_id).sum()) // 2
    with vr.applied(llava.model, [STS(keep=4, refine=2, at=1)]), torch.no_grad():
        cache = llava.model(**inputs).past_key_values
        data = vr.report(llava.model).to_dict()
        text = str(vr.report(llava.model))
        stages = vr.kept_tokens(llava.model)
    json.dumps(data)
    assert [x["tokens"] for x in data["layers"]] == [9, 7, 7, 7]
    assert {x["tokens_before"] for x in data["layers"]} == {n + 5}
    assert data["totals"]["after"]["kv_bytes"] == cache.kv_bytes()
    assert [s.layers for s in stages] == [(0,), (1, 2, 3)]
    assert [int(s.vision.sum()) for s in stages] == [8, 4]
    assert not (stages[1].vision & ~stages[0].vision).any()
    assert "STS(keep=4, refine=2, at=1, features='projected', per='image'): matched" in text
    assert "FLOPs ÷" in text
    assert set(data["seconds"]) >= {"capture", "anatomy", "passes", "legalize"}


def test_flops_are_those_of_the_captured_graph(llava):
    """The anatomy's formula against torch's own counter, on the unmodified decoder."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = llava.inputs([Row(1)])
    program = vr.trace(llava.model, inputs)

    total = sum(c.flops for c in program.costs(program.call.counts))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        program.run()
    length, hidden = program.call.length, llava.model.config.text_config.hidden_size
    head = 2 * length * hidden * llava.model.config.text_config.vocab_size
    assert counter.get_total_flops() == total + head


def test_a_recipe_that_saves_nothing_says_so(llava):
    with vr.applied(llava.model, [Stride(keep=1.0)]):
        llava.model(**llava.inputs([Row(1)]))
        assert "saves no FLOPs" in str(vr.report(llava.model))


@torch.no_grad()
def test_calls_without_an_image_are_no_failure(llava):
    with vr.applied(llava.model, [Stride(keep=4)]):
        llava.model.generate(**llava.inputs(ONE), do_sample=False, max_new_tokens=4, min_new_tokens=4)
        [decoding] = vr.report(llava.model).notes
        llava.model(**llava.inputs([Row(0, 3, 3)]))
        both = vr.report(llava.model).notes
    assert decoding == (
        "3 calls went on from a cache with no new image (decode steps, further turns) and ran all layers, which is"
        " right: what was dropped is not in the cache, and there is nothing else to drop"
    )
    text = (
        "1 call went through the model as it is, prompts of text alone, which is right: they hold no vision tokens to"
    )
    assert both[0] == decoding
    assert both[1:] == (f"{text} drop",)


@pytest.mark.parametrize(
    ("passes", "notes"),
    [
        ([Stride(keep=400)], ["stride drops nothing: at layer 0, keep=400 is all"]),
        ([Stride(keep=16)], ["stride drops nothing: at layer 0, keep=16 is all"]),
        ([Stride(keep=0.99)], ["stride drops nothing: at layer 0, keep=0.99 is all"]),
        (
            [Stride(keep=4), Random(keep=9, at=1)],
            ["random drops nothing: at layer 1, keep=9 is all that is left of each i"],
        ),
        ([Stride(keep=15)], []),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_budget_above_what_is_there_is_noted(llava, passes, notes):
    with vr.applied(llava.model, passes):
        llava.model(**llava.inputs(ONE))
        applied = vr.report(llava.model).notes
    planned = summary(vr.rewrite(vr.trace(llava.model, llava.inputs(ONE)), passes))["notes"]
    for found, where in ((applied, "the last call"), (planned, "this prompt")):
        saved = [f"this recipe saves no FLOPs on {where}"] * (len(passes) == len(notes) == 1)
        assert len(found) == len(notes) + len(saved)
        assert all(text.startswith(start) for text, start in zip(found, notes + saved, strict=True))
