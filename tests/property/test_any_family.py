"""Any family that there is a builder for, any batch, padding and passes: what comes out is what the oracle says."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.depth import same_graphs
from tests.small import long
from vlmrewrite.testing.agreement import forward_agreement
from vlmrewrite.testing.models import ZOO, Row, TinyVLM
from vlmrewrite.testing.strategies import plans, rows, sides, techniques

DEPTH = 4
REFUSED: dict[str, str] = {
    "dots3_note": "decoder layer 0 of .* keeps more than keys and values",
}
"""Families that are refused, with what is said."""

NAMES = sorted(ZOO.keys() - REFUSED.keys())
FEW = settings(max_examples=settings.default.max_examples if long() else 3)  # each captures another model


@functools.cache
def tiny(name: str) -> TinyVLM:
    return ZOO[name](layers=DEPTH)


@FEW
@given(st.sampled_from(NAMES), rows(), sides(), techniques(DEPTH) | st.tuples(plans(DEPTH)), st.integers(0, 99))
def test_forward_agrees_with_the_oracle(name, batch, side, passes, seed):
    model = tiny(name)
    forward_agreement(model.model, model.inputs(batch, side=side, seed=seed), [*passes], strict=False).check()


@FEW
@given(st.sampled_from(NAMES), st.integers(6, 8))
def test_the_graph_of_a_deep_model_is_that_of_a_whole_trace(name, layers):
    same_graphs(ZOO[name](layers=layers), [Row(1, 3, 2), Row(2, 1, 3)])


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises((ValueError, NotImplementedError), match=REFUSED[name]):
        forward_agreement(tiny(name).model, tiny(name).inputs([Row(1, 3, 2)]), [])
