"""With which configuration of a chain VISOR's policy by confidence starts, and who says so."""

from __future__ import annotations

import logging

import pytest
import torch

import vlmrewrite as vr
from tests.small import family
from vlmrewrite.passes import DPVR, VISOR
from vlmrewrite.passes.visor.dispatch import start_of
from vlmrewrite.recipe import Recipe
from vlmrewrite.testing.models import Row

TINY = family("llava")
CHAIN = ({"cross_layers": [0, 2]}, {"self_layers": [2], "cross_layers": [0]}, {"self_layers": 1.0})
ROWS = [Row(1), Row(2, 3, 1), Row(0, 5)]


def sure(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def of_each(likeliest: torch.Tensor, flops: list[list[int]]) -> torch.Tensor:
    """The FLOPs of each layer under each plan, the same for all rows."""
    return torch.tensor(flops, dtype=torch.float64)[:, None].expand(-1, likeliest.shape[1], -1)


@pytest.mark.parametrize(
    ("likeliest", "start", "costs"),
    [
        (sure([0.9, 0.9], [0.9, 0.9], [0.9, 0.9]), 0, [0.25, 0.5, 1.0]),
        (sure([0.1, 0.1], [0.1, 0.1], [0.1, 0.1]), 2, [1.75, 1.5, 1.0]),
        (sure([0.1, 0.1], [0.9, 0.9], [0.1, 0.1]), 1, [0.75, 0.5, 1.0]),
        (sure([0.9, 0.1], [0.1, 0.1], [0.9, 0.9]), 0, [1.0, 1.5, 1.0]),  # of equal ones the cheaper
        (sure([0.8, 0.8], [0.1, 0.1], [0.1, 0.1]), 0, [0.25, 1.5, 1.0]),  # at the threshold is enough
        (sure([float("nan"), 0.9], [0.1, 0.9], [0.1, 0.9]), 0, [0.25, 1.0, 1.0]),  # no plan mends it
    ],
)
def test_the_start_that_costs_least(likeliest, start, costs):
    assert start_of(likeliest, of_each(likeliest, [[1, 0, 0], [1, 1, 0], [2, 1, 1]]), 0.8) == (start, costs)


def test_layers_before_the_plans_part_run_once():
    likeliest = sure([0.1], [0.1], [0.1])
    flops = of_each(likeliest, [[4, 1, 0], [4, 1, 1], [4, 4, 8]])
    assert start_of(likeliest, flops, 0.8) == (2, [(4 + 1 + 2 + 12) / 16, (4 + 2 + 12) / 16, 1.0])


def test_rows_that_cost_more_count_for_more():
    likeliest, flops = sure([0.9, 0.1], [0.9, 0.9]), torch.tensor([[[1.0], [6.0]], [[2.0], [8.0]]], dtype=torch.float64)
    assert start_of(likeliest, flops, 0.8) == (1, [(1 + 6 + 8) / 10, 1.0])
    assert start_of(likeliest.flip(1), flops, 0.8) == (0, [(1 + 2 + 6) / 10, 1.0])


@torch.no_grad()
def test_prompts_of_which_none_is_sure_start_with_the_last(caplog):
    inputs = TINY.inputs(ROWS, seed=2)
    given = Recipe.of(VISOR(policy="confidence", chain=CHAIN, threshold=0.99))
    with caplog.at_level(logging.INFO, logger="vlmrewrite"):
        made = vr.calibrate(TINY.model, given, inputs)
    assert made.passes[0] == VISOR(policy="confidence", chain=CHAIN, threshold=0.99, start=2)
    assert "starts with configuration 2: of 2 prompts 2, 2, 2 were unsure after each" in caplog.text
    expected = TINY.model(**inputs).logits
    with vr.applied(TINY.model, made):
        got = TINY.model(**inputs).logits
        assert "start=2" in str(vr.report(TINY.model))
    real = inputs["attention_mask"].bool()
    assert torch.equal(got[real], expected[real])


@torch.no_grad()
def test_prompts_that_are_sure_at_once_start_with_the_first():
    inputs = [TINY.inputs([row], seed=i) for i, row in enumerate(ROWS[:2])]
    made = vr.calibrate(TINY.model, VISOR(policy="confidence", chain=CHAIN, threshold=1e-6, start=1), inputs)
    assert made.passes[0].start == 0
    assert vr.verify(TINY.model, inputs[0], made) < 1e-5


@torch.no_grad()
def test_a_row_goes_on_from_the_start_and_never_back():
    inputs = TINY.inputs(ROWS, seed=2)
    with vr.applied(TINY.model, VISOR(policy="confidence", chain=CHAIN, threshold=0.99, start=1)):
        TINY.model(**inputs)
        runs = vr.runtime.session_of(TINY.model).last().result.runs
    assert [run.variant for run in runs] == [1, 2]
    assert runs[-1].kept == [0, 1]
    assert runs[0].kept == [2]


def test_without_prompts_it_stays_as_it_is():
    given = Recipe.of(VISOR(policy="confidence", chain=CHAIN))
    assert vr.calibrate(TINY.model, given) is given


def test_it_is_a_part_of_the_recipe(tmp_path):
    given = Recipe.of(VISOR(policy="confidence", chain=CHAIN, start=1))
    given.to_yaml(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml").passes == given.passes


def test_blocks_are_those_of_any_start(tmp_path):
    def recipe(start: int) -> list[object]:
        return [DPVR(at=2, fuse=1), VISOR(policy="confidence", chain=CHAIN, start=start)]

    tiny = family("llava")
    with vr.applied(tiny.model, recipe(0)):
        vr.save_blocks(tiny.model, tmp_path / "blocks")
    with vr.applied(tiny.model, recipe(1)):
        vr.load_blocks(tiny.model, tmp_path / "blocks")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VISOR(policy="router", chain=CHAIN, start=1), r"start=1 is for policy='confidence', got .*'router'"),
        (lambda: VISOR(policy="confidence", chain=CHAIN, start=3), "start=3; expected the number of one of 3"),
        (lambda: VISOR(policy="confidence", chain=CHAIN, start=-1), "start=-1; expected the number of one of 3"),
        (lambda: VISOR(self_layers=[0], start=1), "start=1 is for policy='confidence', got policy=None"),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()
