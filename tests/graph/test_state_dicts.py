"""State dicts of rewritten models: with their blocks and without, and parameters in the place of others."""

from __future__ import annotations

import warnings

import pytest
import torch

import vlmrewrite as vr
from tests.small import WITH_BLOCKS, kept_in, with_trained_blocks
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.testing.models import FAMILIES


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A model, its inputs and logits, and a folder with its recipe and blocks."""
    return kept_in(tmp_path_factory.mktemp("saved"), vr.save_blocks)


def test_a_state_dict_without_the_blocks_says_so():
    model = with_trained_blocks(WITH_BLOCKS).model
    state = model.state_dict()
    plain = {n: t for n, t in state.items() if not n.startswith(ATTRIBUTE)}
    with pytest.warns(UserWarning, match=r"none of the blocks of this Llava.*load_blocks\(model, folder\)"):
        model.load_state_dict(plain, strict=False)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(plain)
    model.load_state_dict(state)


def test_blocks_that_come_from_a_file_stay(one):
    model = FAMILIES["llava"]().model
    vr.apply(model, one[3])
    plain = {n: t for n, t in model.state_dict().items() if not n.startswith(ATTRIBUTE)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(plain, strict=False)
    with torch.no_grad():
        next(getattr(model, ATTRIBUTE).parameters()).add_(1)
    with pytest.warns(UserWarning, match="none of the blocks"):
        model.load_state_dict(plain, strict=False)


@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_holds_the_blocks(one, assign):
    model, inputs, expected, _ = one
    other = FAMILIES["llava"]().model
    vr.apply(other, WITH_BLOCKS)
    other(**inputs)
    other.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=assign)
    assert torch.equal(other(**inputs).logits, expected)


@torch.no_grad()
def test_other_numbers_in_the_place_of_a_parameter_are_used(one):
    model, inputs = FAMILIES["llava"]().model, one[1]
    vr.apply(model, one[3])
    held = getattr(model, ATTRIBUTE)
    for name, p in list(held.named_parameters()):
        setattr(held, name, torch.nn.Parameter(torch.zeros_like(p)))
    with pytest.raises(KeyError, match="expected one of dpvr"):
        held.register_parameter("more", torch.nn.Parameter(torch.zeros(1)))
    assert not torch.equal(model(**inputs).logits, one[2])
    assert float(held.dpvr.self_attn.q_proj.weight.abs().sum()) == 0.0
    assert held["dpvr"] is held.dpvr and "dpvr" in held and "more" not in held
    assert "q_proj" in repr(held)
    assert [name for name, _ in model.named_modules() if ATTRIBUTE in name] == [ATTRIBUTE]
    model.train()
    assert held.dpvr.self_attn.training
