"""Gradients and autocast: what a call has on, and what a part of a forward switches for itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vlmrewrite as vr
from tests.small import exchange_linear, real
from vlmrewrite.capture import captures_of
from vlmrewrite.passes import STS, Stride
from vlmrewrite.testing.models import FAMILIES, Row

ROWS = [Row(1, 3, 2), Row(2, 1, 3)]

ALL = [Stride(keep=1_000_000, at=1)]
"""A recipe that drops nothing, in a graph that is rewritten."""


class Part(nn.Module):
    """A linear map with a part that is under a context of its own."""

    def __init__(self, linear, context):
        super().__init__()
        self.linear, self.context = linear, context

    def forward(self, x):
        y = self.linear(x)
        with self.context():
            part = self.linear(x.float()).softmax(-1)
            top = part.topk(2, -1).values.sum(-1, keepdim=True)
        return y * (1 + part.to(y.dtype)) + top.to(y.dtype)


def model_of(context, layers=4):
    tiny = FAMILIES["llava"](layers=layers)
    for layer in tiny.model.get_decoder().layers:
        exchange_linear(layer.mlp, lambda linear: Part(linear, context))
    return tiny


def gradients(model, inputs):
    labels = inputs["input_ids"].where(real(inputs), -100)
    loss = model(**inputs, labels=labels, use_cache=False).loss
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found | {"loss": loss.detach()}


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


@pytest.mark.filterwarnings("ignore")  # what Inductor itself is warned of
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_part_without_autocast_is_as_precise_as_in_the_model(backend):
    tiny = model_of(off)
    inputs = tiny.inputs(ROWS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = tiny.model(**inputs).logits
        vr.apply(tiny.model, ALL, backend=backend)
        got = tiny.model(**inputs).logits
    if backend == "eager":
        assert torch.equal(got[real(inputs)], expected[real(inputs)])
    else:
        torch.testing.assert_close(got[real(inputs)], expected[real(inputs)], atol=0.1, rtol=0.1)


@pytest.mark.usefixtures("unshared")
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_calls_with_gradients_and_without_share_a_graph(name):
    tiny = FAMILIES[name](layers=3)
    inputs = tiny.inputs(ROWS, side="right")
    vr.apply(tiny.model, [STS(keep=2, refine=1, at=1)])
    with torch.no_grad():
        first = tiny.model(**inputs)
    assert first.logits.grad_fn is None and not torch.is_inference(first.logits)
    with_gradients = tiny.model(**inputs)
    assert with_gradients.logits.requires_grad and torch.equal(with_gradients.logits, first.logits)
    with_gradients.logits[real(inputs)].square().mean().backward()
    vision = [p for n, p in tiny.model.named_parameters() if "projector" in n or "visual" in n]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in vision), "they flow back into the images"
    captures = captures_of(tiny.model)
    assert [len(x.graphs) for x in (captures.call, captures.inner)] == [1, 0]
    with torch.no_grad():
        assert torch.equal(tiny.model(**inputs).logits, first.logits)


class Two(torch.autograd.Function):
    """Two results, which are not known to treat tokens alike behind Dynamo's operator."""

    @staticmethod
    def forward(ctx, x):
        return x * 2, x + 1

    @staticmethod
    def backward(ctx, a, b):
        return 2 * a + b


class Both(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        a, b = Two.apply(self.linear(x))
        return a + b


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by Dynamo itself
def test_without_gradients_a_function_is_traced_into():
    tiny = FAMILIES["llava"](layers=3)
    for layer in tiny.model.get_decoder().layers:
        exchange_linear(layer.mlp, Both)
    inputs = tiny.inputs(ROWS)
    vr.apply(tiny.model, [Stride(keep=0.5)])
    with torch.no_grad():
        tiny.model(**inputs)
        assert tiny.model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 2
        tiny.model(**inputs)
    assert len(captures_of(tiny.model).call.graphs) == 2
