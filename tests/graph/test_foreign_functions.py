"""Autograd functions of another library in a decoder: run on part of the tokens, with their own backward."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vlmrewrite as vr
from tests.small import ONE_EACH, exchange_linear, real
from vlmrewrite.passes import Stride
from vlmrewrite.testing.agreement import forward_agreement
from vlmrewrite.testing.models import FAMILIES, Row

ROWS = [Row(1, 3, 2), Row(2, 1, 3)]

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself


class Doubled(torch.autograd.Function):
    """A linear map whose gradient is twice as large as it is, so that it shows whose backward ran."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x.reshape(-1, x.shape[-1]).matmul(weight.T).reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad @ ctx.saved_tensors[0], None


class Centred(torch.autograd.Function):
    """A linear map of what differs from the mean of all tokens."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return (x - x.mean(1, keepdim=True)) @ weight.T

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.saved_tensors[0], None


class Through(nn.Module):
    def __init__(self, like, function):
        super().__init__()
        self.weight, self.function = nn.Parameter(like.weight.detach(), requires_grad=False), function

    def forward(self, x):
        return self.function.apply(x, self.weight)


def model_of(function, layers=3):
    tiny = FAMILIES["llava"](layers=layers)
    for layer in tiny.model.get_decoder().layers:
        exchange_linear(layer.mlp, lambda linear: Through(linear, function))
    return tiny


def gradients(model, inputs):
    labels = inputs["input_ids"].where(real(inputs), -100)
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("layers", [3, 6])
def test_gradients_are_those_of_its_own_backward(layers):
    tiny = model_of(Doubled, layers)
    inputs = tiny.inputs(ROWS, side="right")
    tiny.model.double()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected = gradients(tiny.model, inputs)
    with vr.applied(tiny.model, [Stride(keep=1_000_000, at=1)]):
        got = gradients(tiny.model, inputs)
    torch.testing.assert_close(got, expected, atol=1e-9, rtol=1e-7)
    for recipe in ("sts", "visor"):
        with vr.applied(tiny.model, ONE_EACH[recipe], strict=True):
            some = gradients(tiny.model, inputs)
        assert some.keys() == expected.keys()
        forward_agreement(tiny.model, inputs, ONE_EACH[recipe]).check()


@pytest.mark.slow
def test_one_that_mixes_tokens_is_refused():
    tiny = model_of(Centred)
    inputs = tiny.inputs(ROWS, side="right")
    with (
        vr.applied(tiny.model, ONE_EACH["sts"]),
        pytest.raises(ValueError, match=r"is not known to treat tokens alike: tokens that were left out changed what"),
    ):
        gradients(tiny.model, inputs)


class Two(torch.autograd.Function):
    """A linear map and its double."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.T, 2 * (x @ weight.T)

    @staticmethod
    def backward(ctx, one, two):
        return (one + 2 * two) @ ctx.saved_tensors[0], None


class Sum(Through):
    def forward(self, x):
        one, two = self.function.apply(x, self.weight)
        return one + two


@pytest.mark.slow
def test_one_of_several_tensors_is_refused():
    tiny = FAMILIES["llava"](layers=3)
    exchange_linear(tiny.model.get_decoder().layers[1].mlp, lambda linear: Sum(linear, Two))
    with (
        vr.applied(tiny.model, ONE_EACH["sts"]),
        pytest.raises(
            ValueError, match="autograd function is not known to treat tokens alike: it gives several tensors"
        ),
    ):
        gradients(tiny.model, tiny.inputs(ROWS))
