"""Gradients and autocast: what a call has on, and what a part of a forward switches for itself."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from torch import nn

import vlmrewrite as vr
from tests.small import exchange_linear, real
from vlmrewrite.passes import Stride
from vlmrewrite.testing.models import FAMILIES, Row

ROWS = [Row(1, 3, 2), Row(2, 1, 3)]

ALL = [Stride(keep=1_000_000, at=1)]
"""A recipe that drops nothing, in a graph that is rewritten."""


class Part(nn.Module):
    """A linear map with a part that is under a context of its own."""

    def __init__(self, linear, *contexts):
        super().__init__()
        self.linear, (self.outer, self.inner) = linear, (*contexts, contextlib.nullcontext)[:2]

    def forward(self, x):
        y = self.linear(x)
        with self.outer(), self.inner():
            part = self.linear(x.float()).softmax(-1)
            top = part.topk(2, -1).values.sum(-1, keepdim=True)
        return y * (1 + part.to(y.dtype)) + top.to(y.dtype)


def model_of(*contexts, layers=4, parts=3):
    """A model whose layers' MLPs have parts, one to three of them."""
    tiny = FAMILIES["llava"](layers=layers)
    for layer in tiny.model.get_decoder().layers:
        made = itertools.count()
        exchange_linear(layer.mlp, lambda x, made=made: Part(x, *contexts) if next(made) < parts else x)
    return tiny


def gradients(model, inputs):
    labels = inputs["input_ids"].where(real(inputs), -100)
    loss = model(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found | {"loss": loss.detach()}


@pytest.mark.slow
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad], ids=["no_grad", "enable_grad"])
def test_a_part_without_gradients_has_none(context):
    tiny = model_of(context)
    tiny.model.double()
    for module in tiny.model.modules():
        if isinstance(module, Part):
            module.linear.float()
            module.register_forward_pre_hook(lambda _, args: (args[0].float(),))
            module.register_forward_hook(lambda _, args, out: out.double())
    inputs = tiny.inputs(ROWS, side="right")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    expected = gradients(tiny.model, inputs)
    with vr.applied(tiny.model, ALL):
        got = gradients(tiny.model, inputs)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def off():
    return torch.autocast("cpu", enabled=False)


def off_elsewhere():
    return torch.autocast("cuda", enabled=False)


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.filterwarnings("ignore")  # what Inductor itself is warned of
@pytest.mark.parametrize(
    ("backend", "contexts"), [("eager", [off]), ("eager", [off, off_elsewhere]), ("inductor", [off])]
)
def test_a_part_without_autocast_is_as_precise_as_in_the_model(backend, contexts):
    compiled = backend == "inductor"
    tiny = model_of(*contexts, layers=1 if compiled else 4, parts=1 if compiled else 3)
    inputs = tiny.inputs(ROWS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = tiny.model(**inputs).logits
        vr.apply(tiny.model, [Stride(keep=1_000_000)] if compiled else ALL, backend=backend)
        got = tiny.model(**inputs).logits
    if backend == "eager":
        assert torch.equal(got[real(inputs)], expected[real(inputs)])
    else:
        torch.testing.assert_close(got[real(inputs)], expected[real(inputs)], atol=0.1, rtol=0.1)


@pytest.mark.slow
@torch.no_grad()
def test_a_traced_program_runs_under_what_its_parts_are_under():
    tiny = model_of(lambda: torch.autocast("cpu", torch.bfloat16), layers=3)
    inputs = tiny.inputs(ROWS)
    expected = tiny.model(**inputs).logits
    program = vr.trace(tiny.model, inputs)
    for one in (program, vr.rewrite(program, ALL)):
        found, _ = one.run()
        logits = next(x for x in found if isinstance(x, torch.Tensor) and x.shape == expected.shape)
        assert torch.equal(logits[real(inputs)], expected[real(inputs)])


class Branching(nn.Module):
    """A forward that does something else where gradients are recorded."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        y = self.linear(x)
        return (y * 3 if torch.is_grad_enabled() else y) + (1 if y.requires_grad else 0)


@pytest.mark.slow
def test_a_forward_may_ask_whether_gradients_are_recorded():
    tiny = FAMILIES["llava"](layers=3)
    for layer in tiny.model.get_decoder().layers:
        exchange_linear(layer.mlp, Branching)
    inputs = tiny.inputs(ROWS)
    calls = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    expected = []
    for mode in calls:
        with mode():
            expected.append(tiny.model(**inputs).logits[real(inputs)].detach().clone())
    with vr.applied(tiny.model, ALL):
        for mode, logits in [*zip(calls, expected, strict=True)] * 2:
            with mode():
                assert torch.equal(tiny.model(**inputs).logits[real(inputs)].detach(), logits)


class Through(torch.autograd.Function):
    """Straight through: a rounded result, and the gradient of what was not."""

    @staticmethod
    def forward(ctx, x):
        return (x * 8).round() / 8

    @staticmethod
    def backward(ctx, grad):
        return grad


class Rounded(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return Through.apply(self.linear(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself
def test_a_projector_learns_through_functions_of_a_frozen_decoder():
    tiny = FAMILIES["llava"](layers=3)
    for layer in tiny.model.get_decoder().layers:
        exchange_linear(layer.mlp, Rounded)
    tiny.model.requires_grad_(False)
    tiny.model.model.multi_modal_projector.requires_grad_(True)
    inputs = tiny.inputs(ROWS, side="right")
    with torch.no_grad():
        tiny.model(**inputs)
    expected = gradients(tiny.model, inputs)
    assert len(expected) > 1
    with vr.applied(tiny.model, ALL):
        with torch.no_grad():
            tiny.model(**inputs)
        torch.testing.assert_close(gradients(tiny.model, inputs), expected, atol=1e-5, rtol=1e-3)
