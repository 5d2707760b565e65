"""What a user reads of a plan: each plan of a dispatch and who chooses, and where the MLP runs on less."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

import vlmrewrite as vr
from tests.small import family
from vlmrewrite.passes import VISOR, Stride
from vlmrewrite.testing.models import Row

TINY = family("llava")
CHAIN = [{"cross_layers": [0, 2]}, {"self_layers": [0], "cross_layers": [2]}, {"self_layers": [0, 1, 2, 3]}]


def test_the_listing_of_a_program_names_the_chooser_and_holds_each_plan():
    recipe = [VISOR(policy="confidence", chain=CHAIN[:2], threshold=0.9)]
    traced = vr.trace(TINY.model, TINY.inputs([Row(1, 2, 3)]))
    program = vr.rewrite(traced, recipe)
    lines = str(program).splitlines()
    assert lines[0] == str(traced).splitlines()[0]
    assert lines[1:3] == ["dispatch by Confidence(at=0, threshold=0.9) at layer 0 among", "variant 0:"]
    alone = [str(vr.rewrite(traced, [VISOR(**each)])).splitlines()[1:] for each in CHAIN[:2]]
    assert lines[3:] == [*alone[0], "variant 1:", *alone[1]]
    assert sum(line.startswith("total: ") for line in lines) == 2
    assert set(program.seconds) >= {"legalize", "verify"}
    with_more = str(vr.rewrite(program, [Stride(keep=2, at=1)]))
    assert with_more.count("stride = Vision.select(stride, keep=2) at layer 1") == 2
    assert "attention: q 4x8" in str(replace(program, call=None))
    assert "variant 1:" in str(replace(program, call=None))


def test_cutting_a_dispatch_is_part_of_legalize(monkeypatch):
    monkeypatch.setattr("vlmrewrite.compiler.dispatch", lambda *_: time.sleep(1.0))
    traced = vr.trace(TINY.model, TINY.inputs([Row(1, 2, 3)]))
    program = vr.rewrite(traced, [VISOR(policy="confidence", chain=CHAIN[:2])], propagate=False)
    assert program.seconds["legalize"] >= 1.0


@torch.no_grad()
def test_the_report_lists_all_plans_and_says_which_was_kept():
    inputs = TINY.inputs([Row(1, 2, 3)])
    with vr.applied(TINY.model, [VISOR(policy=lambda hidden: 1, chain=CHAIN)]):
        TINY.model(**inputs)
        report = vr.report(TINY.model)
    assert [line for line in report.plan.splitlines() if not line.startswith("layer")][1:] == [
        "variant 0:",
        "variant 1:",
        "variant 2:",
    ]
    assert report.plan.splitlines()[0].startswith("dispatch by ")
    assert report.notes == ("layers and totals are those of variant 1 of the plan, which the last call kept",)
    assert [x["run_on"] for x in report.layers] == ["All", "Text", "Text", "Text"]


@torch.no_grad()
def test_where_the_mlp_runs_on_less_it_is_said():
    recipe, inputs = [VISOR(self_layers=[1, 2, 3], sa_vision_mlp=False)], TINY.inputs([Row(1, 2, 3)])
    listing = str(vr.rewrite(vr.trace(TINY.model, inputs), recipe))
    with vr.applied(TINY.model, recipe):
        TINY.model(**inputs)
        report = vr.report(TINY.model)
    assert [line[:23] for line in listing.splitlines()[2:4]] == ["0       Text           ", "1-3     All, MLP Text  "]
    assert "  1-3     All, MLP " in str(report)
    assert [(x["run_on"], x["mlp_on"]) for x in report.layers] == [("Text", "Text"), *[("All", "Text")] * 3]
