"""What is below a model's head, called by others: a trainer with a head of its own, or who wants embeddings."""

from __future__ import annotations

import copy
import gc

import pytest
import torch

import vlmrewrite as vr
from tests.small import ONE_EACH, crossed, family, real
from vlmrewrite.passes import Stride
from vlmrewrite.testing.models import FAMILIES, ZOO, Row

ROWS = [Row(1, 3, 4), Row(2, 5, 6)]


@pytest.mark.slow
@pytest.mark.wide
@torch.no_grad()
@pytest.mark.parametrize(("name", "recipe"), crossed(FAMILIES, ONE_EACH))
def test_it_runs_as_it_does_in_the_model(name, recipe):
    tiny = family(name)
    model, inputs = tiny.model, tiny.inputs(ROWS)
    with vr.applied(model, ONE_EACH[recipe], strict=True):
        expected = model(**inputs).logits
        kept = [stage.vision for stage in vr.kept_tokens(model)]
        model(**tiny.inputs([Row(1, 4, 4)]))
        states = model.base_model(**inputs, use_cache=False).last_hidden_state
        got = model(**inputs, output_hidden_states=True).hidden_states[-1]
        assert all(map(torch.equal, kept, [stage.vision for stage in vr.kept_tokens(model)]))
    torch.testing.assert_close(states[real(inputs)], got[real(inputs)], atol=1e-4, rtol=1e-4)
    assert expected.shape[:2] == states.shape[:2]
    assert "forward" not in vars(model.base_model)


@pytest.mark.slow
@torch.no_grad()
def test_without_an_image_and_on_a_kept_cache():
    tiny = family("llava")
    model, head, one = tiny.model, tiny.model.get_output_embeddings(), torch.tensor([[7, 8, 9]])
    with vr.applied(model, [Stride(0.5)]):
        torch.testing.assert_close(head(model.base_model(input_ids=one).last_hidden_state), model(input_ids=one).logits)
        out = model.base_model(**tiny.inputs(ROWS[:1]))
        cache = out.past_key_values
        held = [layer.keys.shape[2] for layer in cache.layers]
        assert max(held) < out.last_hidden_state.shape[1]
        model(input_ids=one, past_key_values=cache)
        assert [layer.keys.shape[2] for layer in cache.layers] == [n + 3 for n in held]


@pytest.mark.slow
def test_it_is_trained():
    tiny = FAMILIES["llava"](layers=3)
    model, inputs = tiny.model.train(), tiny.inputs(ROWS)
    with vr.applied(model, ONE_EACH["sts"]):
        found = []
        for on in (False, True):
            if on:
                model.activation_checkpointing_enable()
            model.base_model(**inputs, use_cache=False).last_hidden_state.square().mean().backward()
            found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
            model.zero_grad(set_to_none=True)
        assert len(found[0]) > 20
        torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)
    model.activation_checkpointing_disable()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.compile around")
def test_behind_torch_compile_it_is_rewritten_too():
    tiny = family("llava")
    base, inputs = tiny.model.base_model, tiny.inputs(ROWS)
    plain = base(**inputs, use_cache=False).last_hidden_state
    with vr.applied(tiny.model, ONE_EACH["sts"]):
        expected = base(**inputs, use_cache=False).last_hidden_state
        for compiled in (torch.compile(base, backend="eager"), torch.compile(lambda **x: base(**x), backend="eager")):
            got = compiled(**inputs, use_cache=False).last_hidden_state
            assert torch.equal(got, expected)
            assert not torch.equal(got, plain)
    torch._dynamo.reset_code_caches()


@pytest.mark.slow
@torch.no_grad()
def test_one_that_somebody_has_exchanged_stays_so():
    tiny = FAMILIES["llava"](layers=3)
    base, inputs = tiny.model.base_model, tiny.inputs(ROWS)

    def nothing(*args, **kwargs):
        out = type(base).forward(base, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state * 0
        return out

    base.forward = nothing
    with vr.applied(tiny.model, ONE_EACH["stride"]):
        assert not tiny.model(**inputs).logits.any()
        assert not tiny.model(input_ids=torch.tensor([[7, 8]])).logits.any()
    assert base.forward is nothing


@pytest.mark.slow
@torch.no_grad()
def test_a_copy_of_it_alone_is_refused_and_one_without_its_model_runs():
    tiny = FAMILIES["llava"](layers=3)
    model, inputs = tiny.model, tiny.inputs(ROWS)
    plain = model.base_model(**inputs).last_hidden_state
    vr.apply(model, ONE_EACH["stride"])
    with pytest.raises(ValueError, match="this LlavaModel is a copy of a part of a model that a recipe is applied to"):
        copy.deepcopy(model.base_model)(**inputs)
    base = model.base_model
    del model, tiny
    gc.collect()
    assert torch.equal(base(**inputs).last_hidden_state, plain)


@torch.no_grad()
def test_a_recipe_that_chooses_by_logits_is_refused():
    tiny = family("llava")
    with (
        vr.applied(tiny.model, "visor-policy"),
        pytest.raises(NotImplementedError, match="chooses by logits, and LlamaModel"),
    ):
        tiny.model.base_model(**tiny.inputs(ROWS))


@pytest.mark.slow
@torch.no_grad()
def test_a_decoder_that_encodes_images_itself_is_refused():
    tiny = ZOO["chameleon"](layers=3)
    inputs = tiny.inputs(ROWS)
    plain = tiny.model.base_model(input_ids=inputs["input_ids"]).last_hidden_state
    with vr.applied(tiny.model, [Stride(0.5)]):
        with pytest.raises(NotImplementedError, match="its ChameleonModel, which encodes images and is its"):
            tiny.model.base_model(**inputs)
        assert torch.equal(tiny.model.base_model(input_ids=inputs["input_ids"]).last_hidden_state, plain)
        tiny.model(**inputs)
