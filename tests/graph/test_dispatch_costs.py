"""What a dispatch costs: each plan for the rows that follow it, and those that were tried for rows that went on."""

from __future__ import annotations

import pytest
import torch

import vlmrewrite as vr
from tests.small import CHAIN, family
from vlmrewrite.passes import VISOR
from vlmrewrite.testing.models import Row

ROWS = [Row(1, 2, 3), Row(0, 3, 3), Row(3, 1, 3)]


@torch.no_grad()
def test_plans_that_were_tried_in_vain_count_for_the_rows_that_went_on():
    """One row of three is unsure after both of the cheaper plans."""
    tiny = family("llava")
    inputs = tiny.inputs(ROWS)

    def flops(**recipe):
        with vr.applied(tiny.model, [VISOR(**recipe)]) as model:
            model(**inputs)
            return vr.report(model).totals["after"]["flops"]

    tried = flops(policy="confidence", chain=CHAIN, threshold=0.2)
    told = flops(policy=lambda hidden: torch.tensor([2, 0, 0]), chain=CHAIN)
    in_vain = sum(flops(**configuration) for configuration in CHAIN[:2])
    assert tried - told == pytest.approx(in_vain / 3, abs=2)
