"""``output_hidden_states`` of a rewritten model: the stream that leaves each layer, all tokens of it."""

from __future__ import annotations

import contextlib

import pytest
import torch

import vlmrewrite as vr
from tests.small import ONE_EACH, family, real
from vlmrewrite.oracle import layer_masks
from vlmrewrite.oracle.hooks import masked
from vlmrewrite.passes import STS, Stride
from vlmrewrite.testing.models import FAMILIES, Row

ROWS = [Row(1, 2, 3), Row(2, 5, 6)]
DEEP = {"stride": [Stride(0.5, at=2)], "sts": [STS(keep=5, refine=3, at=3)]}
"""Of a model some layers of which are copies of others."""


def recorded(model, inputs):
    """What goes into the first layer of the oracle, what comes out of each, and of the norm behind them."""
    rewritten, masks, found = model.__dict__.pop("forward"), layer_masks(model), []
    decoder = model.get_decoder()
    with masked(model, masks), contextlib.ExitStack() as stack:
        first = decoder.layers[0].register_forward_pre_hook(lambda _, args: found.append(args[0]))
        stack.callback(first.remove)
        for module in (*decoder.layers[:-1], decoder.norm):
            hook = module.register_forward_hook(lambda _, __, out: found.append(out))
            stack.callback(hook.remove)
        model(**inputs, use_cache=False)
    model.__dict__["forward"] = rewritten
    return found


@pytest.mark.wide
@torch.no_grad()
@pytest.mark.parametrize("recipe", [*ONE_EACH, "dispatch"])
def test_they_are_the_oracles(llava, recipe):
    model, inputs = llava.model, llava.inputs(ROWS)
    with vr.applied(model, ONE_EACH.get(recipe, "visor-policy"), strict=True):
        plain = model(**inputs)
        out = model(**inputs, output_hidden_states=True)
        expected = recorded(model, inputs)
    assert plain.hidden_states is None
    assert torch.equal(plain.logits, out.logits)
    assert len(out.hidden_states) == len(expected) == 5
    for got, right in zip(out.hidden_states, expected, strict=True):
        torch.testing.assert_close(got[real(inputs)], right[real(inputs)], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.wide
@torch.no_grad()
@pytest.mark.parametrize(("name", "recipe"), [("llava", "sts"), ("qwen2_5_vl", "stride")])
def test_of_a_deep_model(name, recipe):
    tiny = FAMILIES[name](layers=7)
    inputs = tiny.inputs(ROWS)
    with vr.applied(tiny.model, DEEP[recipe], strict=True):
        tiny.model(**inputs)
        out = tiny.model(**inputs, output_hidden_states=True)
        expected = recorded(tiny.model, inputs)
    assert len(out.hidden_states) == len(expected) == 8
    for got, right in zip(out.hidden_states, expected, strict=True):
        torch.testing.assert_close(got[real(inputs)], right[real(inputs)], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_in_generate_and_by_the_config(monkeypatch):
    model, inputs = family("llava").model, family("llava").inputs(ROWS)
    expected = model.generate(**inputs, max_new_tokens=3, do_sample=False, output_hidden_states=True,
                              return_dict_in_generate=True)  # fmt: skip
    with vr.applied(model, [Stride(1.0)]):
        got = model.generate(**inputs, max_new_tokens=3, do_sample=False, output_hidden_states=True,
                             return_dict_in_generate=True)  # fmt: skip
        monkeypatch.setattr(model.config.text_config, "output_hidden_states", True)
        told = model(**inputs).hidden_states
        untold = model(**inputs, output_hidden_states=False)
    assert untold.hidden_states is None
    assert torch.equal(got.sequences, expected.sequences)
    for step, right in zip(got.hidden_states, expected.hidden_states, strict=True):
        for x, y in zip(step, right, strict=True):
            assert x.shape == y.shape
            seen = real(inputs) if x.shape[:2] == inputs["input_ids"].shape else ...
            torch.testing.assert_close(x[seen], y[seen], atol=1e-4, rtol=1e-4)
    for x, y in zip(told, got.hidden_states[0], strict=True):
        torch.testing.assert_close(x, y)
