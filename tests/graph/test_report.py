"""Reports: before and after a call, as text, as data, as HTML."""

from __future__ import annotations

import json

import pytest
import torch

import vlmrewrite as vr
from vlmrewrite.passes import STS, Stride
from vlmrewrite.testing.models import Row


def test_before_any_call(llava):
    with vr.applied(llava.model, "sts-half"):
        report = vr.report(llava.model)
        assert report.to_dict()["passes"][0]["matched"] is None
        assert "not tried yet" in str(report)
        assert "sts-half" in report._repr_html_()
        with pytest.raises(ValueError, match="no call with an image was made"):
            vr.kept_tokens(llava.model)


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
    assert "STS(keep=4, refine=2, at=1, features='projected'): matched" in text
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
