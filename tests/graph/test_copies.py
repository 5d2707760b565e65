"""Copies and pickles of rewritten models: they are rewritten too, by a session and blocks of their own."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch

import vlmrewrite as vr
from tests.small import losses
from vlmrewrite.passes import DPVR, STS, Stride
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.runtime import session_of
from vlmrewrite.testing.models import FAMILIES, ZOO, Row

ENCODER = [STS(keep=4, refine=None, features="encoder")]
BLOCKS = [DPVR(at=2, fuse=1)]
GREEDY = {"do_sample": False, "max_new_tokens": 3}


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved}


@pytest.fixture
def tiny():
    return FAMILIES["llava"](layers=4)


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("recipe", [ENCODER, BLOCKS], ids=["encoder", "blocks"])
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_rewritten_by_itself(tiny, recipe, way):
    model, inputs = tiny.model, tiny.inputs([Row(1, 2, 3)])
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    vr.apply(model, recipe, backend="eager", kernels="reference", strict=True)
    with torch.no_grad():
        for p in getattr(model, ATTRIBUTE, torch.nn.Identity()).parameters():
            p.add_(torch.randn_like(p) / 10)
    asked = {n: p.requires_grad for n, p in model.named_parameters()}
    made = WAYS[way](WAYS[way](model))  # before a call, in which transformers puts hooks on that cannot be pickled
    expected, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == asked
    assert {n: p.requires_grad for n, p in made.named_parameters()} == asked
    assert not {id(t) for t in made.parameters()} & {id(t) for t in model.parameters()}
    assert torch.equal(made(**inputs).logits, expected)
    assert torch.equal(made.generate(**inputs, **GREEDY), tokens)
    told, given = session_of(made), session_of(model)
    assert told is not given
    assert (told.recipe, told.backend, told.kernels, told.strict) == (given.recipe, "eager", "reference", True)

    vr.restore(model)
    assert torch.equal(made(**inputs).logits, expected)
    plain = model(**inputs).logits
    vr.restore(made)
    assert torch.equal(made(**inputs).logits, plain)
    assert {n for n, p in made.named_parameters() if p.requires_grad} == learning
    assert vars(made).keys() == vars(model).keys()
    assert not {"forward", "get_image_features", ATTRIBUTE} & (vars(made.model) | vars(made.get_decoder())).keys()
    vr.apply(made, recipe)


@pytest.mark.slow
def test_blocks_of_a_copy_are_trained_apart(tiny):
    model, inputs = tiny.model, tiny.inputs([Row(1, 2, 3)])
    vr.apply(model, BLOCKS)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    expected = model(**inputs).logits
    made = copy.deepcopy(model)
    losses(made, inputs, [p for p in made.parameters() if p.requires_grad], 0.5, 2)
    assert not torch.equal(made(**inputs).logits, expected)
    assert torch.equal(model(**inputs).logits, expected)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert made.state_dict().keys() == before.keys()


@pytest.mark.slow
@torch.no_grad()
def test_a_shallow_copy_has_the_same_tensors(tiny):
    model, inputs = tiny.model, tiny.inputs([Row(1, 2, 3)])
    vr.apply(model, BLOCKS)
    made = copy.copy(model)
    assert [id(p) for p in made.parameters()] == [id(p) for p in model.parameters()]
    expected = model(**inputs).logits
    vr.restore(model)
    assert torch.equal(made(**inputs).logits, expected)


@torch.no_grad()
def test_what_a_model_has_of_its_own_is_its_copys(tiny):
    model, inputs, calls = tiny.model, tiny.inputs([Row(1, 2, 3)]), []

    @functools.wraps(model.prepare_inputs_for_generation)
    def prepare(*args, **kwargs):
        calls.append(1)
        return type(model).prepare_inputs_for_generation(model, *args, **kwargs)

    model.prepare_inputs_for_generation = prepare
    vr.apply(model, ENCODER)
    made = copy.deepcopy(model)
    calls.clear()
    made.generate(**inputs, **GREEDY)
    assert len(calls) == GREEDY["max_new_tokens"]
    vr.restore(made)
    assert vars(made)["prepare_inputs_for_generation"] is prepare
    assert vars(model)["prepare_inputs_for_generation"] is not prepare


@torch.no_grad()
def test_a_copy_has_configs_of_its_own(tiny):
    model = tiny.model
    vr.apply(model, ENCODER)
    made = copy.deepcopy(model)
    vr.restore(model)
    vr.restore(made)
    for one in (model, made):
        configs = {id(m.config) for m in one.get_decoder().modules() if hasattr(m, "config")}
        assert configs == {id(one.config.text_config)}
    assert model.config.text_config is not made.config.text_config
    made.set_attn_implementation("eager")
    assert model.get_decoder().config._attn_implementation == "sdpa"


@pytest.mark.wide
@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["qwen3_5", "step3p7", "blip_2", "gemma3n"])
def test_copies_of_other_kinds_of_models(name, way):
    """Recurrent layers, experts, a language model that generates by itself, several hidden states of a token."""
    tiny = ZOO[name](layers=4)
    model, inputs = tiny.model, tiny.inputs([Row(1, 2, 3)])
    plain = model(**inputs).logits
    vr.apply(model, Stride(keep=0.5))
    expected = model(**inputs).logits
    made = WAYS[way](model)
    assert torch.equal(made(**inputs).logits, expected)
    vr.restore(made)
    assert torch.equal(made(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, expected)
