"""Any family that there is a builder for, any batch, padding and passes: what comes out is what the oracle says."""

from __future__ import annotations

import functools
import re

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.depth import same_graphs
from vlmrewrite.errors import CaptureError
from vlmrewrite.passes import Stride
from vlmrewrite.testing.agreement import forward_agreement
from vlmrewrite.testing.models import ZOO, Row, TinyVLM
from vlmrewrite.testing.strategies import plans, rows, sides, techniques

DEPTH = 4
BOTH = "keeps keys and a recurrent state side by side"
REFUSED = {
    "glm5_next": "selects keys by an index, and takes",
    "mistral_large4": "selects keys by an index, and takes",
    "qwen4_exp": "to take the cache, found",
    "unlimited_ocr": "keeps more than keys and values and one index over them",
    "inkling2": BOTH,
    "inkling_mm_model": BOTH,
    "phi4_multimodal": "has no get_image_features",
    "ernie4_5_vl_moe": "Python branches on a tensor's value",
}
"""Families that are refused, with what is said."""

NO_MEANING = "its MLP cannot run on"
"""What is said of plans that mean nothing in some families."""

NAMES = sorted(ZOO.keys() - REFUSED.keys())


@functools.cache
def tiny(name: str) -> TinyVLM:
    return ZOO[name](layers=DEPTH)


DRAWN = {
    "batch": rows(),
    "side": sides(),
    "passes": techniques(DEPTH) | st.tuples(plans(DEPTH)),
    "seed": st.integers(0, 99),
}
"""What a family is called with."""


def agrees(name, batch, side, passes, seed):
    """Check one example; whether its plan means anything in the family."""
    model = tiny(name)
    try:
        found = forward_agreement(model.model, model.inputs(batch, side=side, seed=seed), [*passes], strict=False)
    except ValueError as e:
        if re.search(NO_MEANING, str(e)):
            return False
        raise
    found.check()
    return True


@pytest.mark.slow
@given(st.sampled_from(NAMES), st.fixed_dictionaries(DRAWN))
def test_forward_agrees_with_the_oracle(name, drawn):
    assume(agrees(name, **drawn))


@pytest.mark.slow
@settings(max_examples=max(2, settings.default.max_examples // 4))  # each captures twice
@given(st.sampled_from(NAMES), st.integers(6, 8))
def test_the_graph_of_a_deep_model_is_that_of_a_whole_trace(name, layers):
    same_graphs(ZOO[name](layers=layers), [Row(1, 3, 2), Row(2, 1, 3)])


@pytest.mark.wide
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises((ValueError, CaptureError), match=f"(?s){REFUSED[name]}"):
        forward_agreement(tiny(name).model, tiny(name).inputs([Row(1, 3, 2)]), [Stride(0.5)])
