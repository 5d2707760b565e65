"""Another default device than the model's, as ``torch.set_default_device`` leaves it: each tensor has its own place."""

from __future__ import annotations

import functools

import pytest
import torch

import vlmrewrite as vr
from tests.small import with_grid
from vlmrewrite.passes import DAPE, STS
from vlmrewrite.testing.models import Row

BATCH = [Row(2, 1, 3), Row(0, 4, 2), Row(1, 3, 4)]
RECIPES = {
    "sts": [STS(keep=9, refine=4)],
    "confidence": "visor-policy",
    "split": [DAPE(budget=9)],
    "inject": [DAPE(budget=9, mode="inject", matching="learned")],
}


@functools.cache
def family():
    return with_grid("llava")


@pytest.mark.wide
@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_tensor_says_where_it_is(recipe):
    tiny = family()
    inputs = tiny.inputs(BATCH)

    def run():
        torch.manual_seed(0)
        with vr.applied(tiny.model, recipe) as model:
            tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False)
            return model(**inputs).logits, tokens, vr.kept_tokens(model)

    with torch.no_grad():
        expected = run()
        with torch.device("meta"):
            got = run()
    torch.testing.assert_close(got[:2], expected[:2], rtol=0, atol=0)
    assert str(got[2]) == str(expected[2])
