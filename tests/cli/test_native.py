"""The hand-written loop that recipes are measured against: its logits are theirs, or it says why there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CHAIN, family, with_grid
from test_cli import output

from vlmrewrite.api import applied
from vlmrewrite.bench import bench
from vlmrewrite.bench import models as measuring
from vlmrewrite.bench.native import NativeLoop
from vlmrewrite.cli.prompt import Shape, captured_prompt
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, DivPrune, FastV, Random, ShortV, Stride
from vlmrewrite.recipe import Recipe
from vlmrewrite.testing.models import Row

RECIPES = {
    "stride": [Stride(keep=0.5)],
    "random": [Random(keep=5, at=2)],
    "sts": [STS(keep=0.75, refine=0.25)],
    "fastv": [FastV(keep=0.5, at=1)],
    "steps": [FastV(keep=0.75, at=1), FastV(keep=0.25, at=2), FastV(keep=2, at=3)],
    "divprune": [DivPrune(keep=0.25)],
    "branch": [DPVR(at=1, fuse=1)],
    "branch-random": [DPVR(at=1, fuse=1, branch="random")],
    "branch-none": [DPVR(at=1, fuse=2, branch="identity")],
    "branch-at-once": [DPVR(at=2, fuse=2)],
    "kinds": [VISOR(self_layers=[0, 2], cross_layers=[3], sa_vision_mlp=False)],
    "cross": [VISOR(cross_layers=[1, 3])],
    "frozen": [ShortV([1, 2])],
    "regions": [DAPE(budget=0.5)],
    "several": [STS(keep=0.75, refine=0.5), VISOR(self_layers=[0, 1], cross_layers=[2]), DPVR(at=3, fuse=0)],
}


def loops(model: Any, inputs: dict[str, Any], passes: Any, n: int = 3) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Logits of a recipe, prefill and decode steps, and those of the loop, which is given the same tokens."""
    with torch.no_grad(), applied(model, Recipe.of(passes), backend="eager"):
        seen = measuring._logits(model, inputs, n)
        loop = NativeLoop(model)
    with torch.no_grad(), loop.in_place() as forward:
        return seen, measuring._logits(forward, inputs, n, [x.argmax(-1, keepdim=True) for x in seen])


@pytest.mark.parametrize("name", RECIPES)
def test_the_loop_does_what_a_recipe_does(name: str) -> None:
    tiny = with_grid("llava")
    inputs = tiny.inputs([Row(images=1, before=3, after=4), Row(images=1, before=1, after=6)])
    for one, other in zip(*loops(tiny.model, inputs, RECIPES[name]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    assert "forward" not in vars(tiny.model.get_decoder())


@pytest.mark.wide
@pytest.mark.parametrize("name", ["llava_qwen2", "qwen2_5_vl", "internvl", "smolvlm"])
def test_families_whose_layers_are_the_usual_ones(name: str) -> None:
    tiny = family(name)
    _, inputs = captured_prompt(tiny.model, Shape(16, text=6, images=2))
    for passes in (RECIPES["sts"], RECIPES["kinds"]):
        for one, other in zip(*loops(tiny.model, inputs, passes), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_rows_with_different_numbers_of_tokens() -> None:
    tiny = family("llava")
    inputs = tiny.inputs([Row(images=2, before=3, after=4), Row(images=1, before=3, after=21)])
    assert bool(inputs["attention_mask"].all())
    for one, other in zip(*loops(tiny.model, inputs, [Stride(keep=4), VISOR(cross_layers=[1])]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_rows_that_follow_different_plans() -> None:
    tiny = family("llava")
    inputs = tiny.inputs([Row(images=1, before=3, after=4), Row(images=1, before=1, after=6)])

    def policy(hidden: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0, 2], device=hidden.device)

    for one, other in zip(*loops(tiny.model, inputs, [VISOR(policy=policy, chain=CHAIN)]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_what_the_loop_refuses() -> None:
    row = Row(images=1, before=3, after=4)
    for name, passes, rows, reason in (
        ("gemma3", [Stride(keep=0.5)], [row], r"expects Gemma3DecoderLayer to be made of input_layernorm, mlp, .*; "),
        ("llava", [Stride(keep=0.5)], [row, Row(images=1, before=3, after=9)], "a whole prompt without padding"),
        ("llava", [DAPE(budget=0.5, mode="inject")], [row], "has no attention, which edit 'detail' needs"),
    ):
        tiny = with_grid(name)
        with torch.no_grad(), applied(tiny.model, Recipe.of(passes), backend="eager"):
            tiny.model(**tiny.inputs(rows))
            with pytest.raises(ValueError, match=reason):
                NativeLoop(tiny.model)


@pytest.mark.slow
def test_a_loop_that_is_wrong_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = family("llava")
    inputs = tiny.inputs([Row(images=1, before=3, after=4)])
    monkeypatch.setattr("vlmrewrite.bench.native._rotated", lambda x, rope: x)
    found = bench(
        tiny.model, inputs, [Recipe.of([Stride(keep=0.5)])], backend="eager", repeat=1, new_tokens=2, native=True
    )
    plain, row = found["rows"]
    assert "native" not in plain
    assert "away from the recipe's" in row["native"]["refused"]
    assert len(row["prefill"]) == 1


def test_a_compiled_model_has_no_loop_beside_it() -> None:
    tiny = family("llava")
    with pytest.raises(ValueError, match="expected backend='eager', got 'inductor'"):
        bench(tiny.model, tiny.inputs([Row(images=1)]), [], backend="inductor", native=True)


@pytest.mark.slow
def test_the_command(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    options = ("--repeat", 2, "--new-tokens", 2, "--json", out, "--text", 5, "--native")
    text = output("bench", folder, "--recipe", "stride-half", "--recipe", "dape-half", *options)
    assert "of native" in text
    found = json.loads(out.read_text())
    assert found["clock"] in ("process", "wall")
    plain, stride, regions = sorted(
        found["rows"],
        key=lambda row: ["unmodified", "stride-half"].index(row["name"]) if row["name"] != "dape-half" else 2,
    )
    assert plain["prefill_ratios"] == [1.0, 1.0]
    loop = stride["native"]
    assert [len(loop[k]) for k in ("prefill", "decode", "prefill_process", "decode_efficiency_ratios")] == [2] * 4
    assert loop["max_logit_error"] < 1e-4
    assert loop["kv_bytes"] == stride["kv_bytes"]
    took = stride["prefill_process" if found["clock"] == "process" else "prefill"]
    other = loop["prefill_process" if found["clock"] == "process" else "prefill"]
    assert loop["prefill_efficiency_ratios"] == pytest.approx([b / a for a, b in zip(took, other, strict=True)])
    assert regions["native"]["prefill_efficiency"] > 0
