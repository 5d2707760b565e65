"""Activation checkpointing of a rewritten model: the same gradients, fewer tensors kept for them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

import vlmrewrite as vr
from tests.small import ONE_EACH, crossed, real
from vlmrewrite.passes import STS, Stride
from vlmrewrite.runtime import SESSIONS
from vlmrewrite.testing.models import FAMILIES, Row

ROWS = [Row(1, 9, 12), Row(2, 20, 30)]
SOME = [STS(keep=6, refine=3, at=2)]


@pytest.fixture(scope="module")
def tiny():
    made = FAMILIES["llava"](layers=4)
    made.model.train()
    return made


def trained(model, inputs):
    """The loss, the gradients, and the bytes that were kept for these."""
    kept = {}

    def keep(x):
        if not isinstance(x, nn.Parameter):
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = model(**inputs, labels=inputs["input_ids"].where(real(inputs), -100), use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients, sum(kept.values())


def layers_of(model):
    return [layer.gradient_checkpointing for layer in model.get_decoder().layers]


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize(("recipe", "reentrant"), crossed([*ONE_EACH, "dispatch"], [False, True]))
def test_the_gradients_are_the_same_and_less_is_kept(tiny, recipe, reentrant):
    model, inputs = tiny.model, tiny.inputs(ROWS)
    with vr.applied(model, ONE_EACH.get(recipe, "visor-policy"), strict=True):
        loss, gradients, kept = trained(model, inputs)
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        again, the_same, less = trained(model, inputs)
        assert model.is_activation_checkpointing
        model.activation_checkpointing_disable()
        assert trained(model, inputs)[2] > 0.99 * kept
    assert gradients
    torch.testing.assert_close(again, loss)
    torch.testing.assert_close(the_same, gradients, atol=1e-6, rtol=1e-5)
    assert less < kept * (0.8 if recipe == "dpvr" else 0.4)  # of DPVR, only what is behind the branch has a gradient
    assert not model.is_activation_checkpointing


@pytest.mark.slow
def test_every_second_layer(tiny):
    model, inputs = tiny.model, tiny.inputs(ROWS)
    with vr.applied(model, SOME):
        _, gradients, kept = trained(model, inputs)
        model.activation_checkpointing_enable(every_n_layers=2)
        _, some_gradients, some = trained(model, inputs)
        model.activation_checkpointing_enable()
        _, _, least = trained(model, inputs)
    model.activation_checkpointing_disable()
    assert least < 0.7 * some < 0.6 * kept
    torch.testing.assert_close(some_gradients, gradients, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_switching_it_off_and_on_makes_nothing_anew(tiny):
    model, inputs = tiny.model, tiny.inputs(ROWS)
    with vr.applied(model, SOME):
        for _ in range(3):
            model.activation_checkpointing_enable()
            model(**inputs)
            model.activation_checkpointing_disable()
            model(**inputs)
        made = [len(made) for made in SESSIONS[model].executables.values()]
    assert sum(made) == 2 * len(made)


@pytest.mark.slow
def test_a_model_is_given_back_as_it_was(tiny):
    model, inputs = tiny.model, tiny.inputs(ROWS)
    model.activation_checkpointing_enable()
    with vr.applied(model, SOME):
        _, _, kept = trained(model, inputs)
    assert layers_of(model) == [True] * 4
    assert "gradient_checkpointing" not in vars(model.get_input_embeddings())
    with vr.applied(model, SOME):
        trained(model, inputs)
        model.activation_checkpointing_disable()
        assert trained(model, inputs)[2] > kept
    assert layers_of(model) == [False] * 4


@pytest.mark.slow
def test_nothing_is_computed_again_without_a_gradient_or_training(tiny):
    model, inputs, calls = tiny.model, tiny.inputs(ROWS), []

    def run(function, *args):
        calls.append(function)
        return function(*args)

    with vr.applied(model, [Stride(0.5)]):
        model.activation_checkpointing_enable()
        for layer in model.get_decoder().layers:
            layer._gradient_checkpointing_func = functools.partial(run)
        model(**inputs)
        assert len(calls) == 4
        with torch.no_grad():
            model(**inputs)
        model.eval()
        model(**inputs)
        assert len(calls) == 4
    model.train()
    model.activation_checkpointing_disable()


@pytest.mark.slow
def test_what_is_refused(tiny, monkeypatch):
    model, inputs = tiny.model, tiny.inputs(ROWS)
    part = model.get_decoder().layers[1].mlp
    with vr.applied(model, [Stride(0.5)]):
        monkeypatch.setattr(part, "gradient_checkpointing", True, raising=False)
        with pytest.raises(NotImplementedError, match=r"is on in LlamaMLP, by other means than model\.activation_"):
            model(**inputs)
    monkeypatch.undo()
    with vr.applied(model, [Stride(0.5)], backend="inductor"):
        model.activation_checkpointing_enable()
        with pytest.raises(NotImplementedError, match="expected backend='eager'"):
            model(**inputs)
    model.activation_checkpointing_disable()
