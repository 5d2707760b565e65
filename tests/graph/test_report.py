"""Reports: before and after a call, as text, as data, as HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch

import vlmrewrite as vr
from vlmrewrite.markup import MARK, bars
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


@pytest.mark.slow
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


# ---- as text and as HTML


class Page(HTMLParser):
    """Headings and text of a page whose tags are all closed, and what shows colours that are not the page's."""

    def __init__(self, page):
        super().__init__()
        self.open, self.headings, self.text, self.colours = [], [], [], set()
        self.feed(page)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)
        self.colours |= {value for name, value in attrs if name in ("fill", "stroke", "bgcolor", "color")}
        styles = [part.partition(":") for name, value in attrs if name == "style" for part in value.split(";")]
        self.colours |= {value for name, _, value in styles if name in ("background", "color")}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("h3", "h4"):
            self.headings.append(data)


def seen(tiny, passes, rows=ONE):
    with vr.applied(tiny.model, passes), torch.no_grad():
        tiny.model(**tiny.inputs(rows))
        return vr.report(tiny.model)


def test_the_text_fits_80_columns_and_folds_kernels(llava):
    report = seen(llava, [STS(keep=4, refine=2, at=1), Stride(keep=0.5, at=2, per="image")], [Row(1, 2, 3), Row(1)])
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    [kernels] = [line for line in lines if line.startswith("kernels:")]
    nodes = sum(choice["nodes"] for made in report.kernels.values() for choice in made)
    assert kernels == f"kernels: reference for {nodes} nodes (which and why: report.detail())"
    detail = report.detail().splitlines()
    assert max(map(len, detail)) <= 80
    assert [line for line in detail if line in lines] == lines
    told = " ".join(report.detail().split())
    for name, made in report.kernels.items():
        assert all(f"{name} x{choice['nodes']}" in told and choice["why"] in told for choice in made)


def test_html_has_headings_bars_and_the_kept_tokens_in_the_colours_of_the_page(llava):
    report = seen(llava, [STS(keep=4, refine=2, at=1)])
    for whole in (report._repr_html_(), report.to_html()):
        page = Page(whole)
        assert page.headings == [
            "Recipe custom, backend eager",
            "Passes",
            f"Last call with an image: {report.call['summary']}",
            "Vision tokens that were kept",
            "Plan",
            "Graphs",
        ]
        assert page.colours == {"currentColor", "inherit", "none", MARK}
        assert report.picture() in whole
    first = report.layers[0]
    assert f"layer 0: {first['flops'] / 1e9:.4g} GFLOP of {first['flops_before'] / 1e9:.4g} GFLOP" in page.text
    assert sum("GFLOP of " in text for text in page.text if text.startswith("layer ")) == len(report.layers)


def test_bars_are_as_tall_as_what_they_show():
    drawn = bars("a < b", [4, 4, 0], [2, 4, 1], ["x", "y & z", "&"])
    assert re.findall(r'height="([\d.]+)" f', drawn) == ["64.00", "32.00", "64.00", "64.00", "0.00", "16.00"]
    assert "a &lt; b" in drawn and "layer 1: y &amp; z" in drawn
    Page(bars("none", [0], [0], [""]))


def test_html_of_recipes_plans_and_programs(llava):
    program = vr.trace(llava.model, llava.inputs(ONE))
    made = vr.rewrite(program, [STS(keep=4, refine=2, at=1)])
    assert Page(made._repr_html_()).headings == ["Program", "Passes", "Layers", "Listing"]
    assert Page(program._repr_html_()).headings == ["Program", "Listing"]
    assert str(program.plan) in Page(program.plan._repr_html_()).text
    evil = "<script>alert('1')</script>&\""
    page = Page(vr.Recipe(name=evil, description=evil, passes=(STS(),))._repr_html_())
    assert page.headings == [f"Recipe {evil}", "Passes, in order"]
    assert {evil, repr(STS())} <= set(page.text)
