"""What happens around a model between two of its calls, and is no reason to capture it again."""

from __future__ import annotations

import pytest
import torch

import vlmrewrite as vr
from tests.small import ONE_EACH
from vlmrewrite.capture import captures_of
from vlmrewrite.testing.models import FAMILIES, Row

ROWS = [Row(1, 3, 4), Row(2, 5, 6)]


@pytest.fixture
def tiny(unshared):
    return FAMILIES["llava"](layers=2)


def graphs(model):
    return len(captures_of(model).call.graphs)


@pytest.mark.slow
@torch.no_grad()
def test_traced_first_and_applied_afterwards(tiny):
    model, inputs = tiny.model, tiny.inputs(ROWS)
    for recipe in ("stride", "sts"):
        vr.trace(model, inputs)
        assert "forward" not in vars(model.base_model) | vars(model.base_model.language_model)
        with vr.applied(model, ONE_EACH[recipe]):
            model(**inputs)
            assert graphs(model) == 1


@pytest.mark.slow
@torch.no_grad()
def test_what_is_below_the_head_is_called_by_itself(tiny):
    model, inputs = tiny.model, tiny.inputs(ROWS)
    with vr.applied(model, ONE_EACH["stride"]):
        model(**inputs)
        model.base_model(**inputs)
        model(**inputs)
        assert graphs(model) == 1


@pytest.mark.slow
@torch.no_grad()
def test_a_model_of_another_class_is_made(tiny):
    model, inputs = tiny.model, tiny.inputs(ROWS)
    with vr.applied(model, ONE_EACH["stride"]):
        model(**inputs)
        for name in ("Another", "AndAnother"):
            type(name, (type(model),), {})(model.config)
            model(**inputs)
        assert graphs(model) == 1
