"""Decoders that have several hidden states of each token, on an axis in front of the batch."""

from __future__ import annotations

import pytest
import torch

import vlmrewrite as vr
from tests.small import CHAIN, ONE_EACH, crossed
from vlmrewrite.passes import VISOR, FastV, Stride
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.matrix.cases import CASES
from vlmrewrite.testing.models import ZOO, Row

ROWS = [Row(1, 3, 2), Row(2, 1, 3), Row(0, 4, 1)]
PARTED = [{"self_layers": [0]}, {"self_layers": [0, 2]}, {"self_layers": [0, 1, 2, 3]}]
"""Configurations that part behind layer 0."""

RECIPES = ONE_EACH | {"dispatch": [Stride(0.5), VISOR(policy="confidence", chain=PARTED, threshold=0.5)]}


@pytest.fixture(scope="module")
def tiny():
    return ZOO["gemma3n"](layers=4)


@pytest.mark.wide
@pytest.mark.parametrize(("recipe", "side"), crossed(RECIPES, ["left", "right"]))
def test_agrees_with_the_oracle(tiny, recipe, side):
    inputs = tiny.inputs(ROWS, side=side, seed=1)
    forward_agreement(tiny.model, inputs, RECIPES[recipe]).check()
    if side == "left":
        generation_agreement(tiny.model, inputs, RECIPES[recipe], 3).check()


@pytest.mark.parametrize("case", ["turns", "beams"])
def test_other_ways_to_generate(tiny, case):
    inputs = tiny.inputs(CASES[case].rows)
    assert CASES[case].amiss(tiny) is None
    CASES[case].check(tiny, inputs, FastV(keep=0.5, at=1)).check()


@torch.no_grad()
def test_the_states_are_found(tiny):
    program = vr.trace(tiny.model, tiny.inputs(ROWS))
    assert program.anatomy.states == tiny.model.config.text_config.altup_num_inputs == 4
    assert program.anatomy.hidden == tiny.model.config.text_config.hidden_size


def test_what_reads_one_state_is_refused(tiny):
    program = vr.trace(tiny.model, tiny.inputs(ROWS))
    with pytest.raises(ValueError, match="the decoder has 4 hidden states of each token; what reads one is refused"):
        vr.rewrite(program, VISOR(policy="router", chain=CHAIN))
