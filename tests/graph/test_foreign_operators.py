"""Models whose linear maps are another library's: operators that nobody declared, weights that cannot be trained."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

import vlmrewrite as vr
from tests.small import exchange_linear
from vlmrewrite.hf import dequantise
from vlmrewrite.passes import DPVR, STS, VISOR, FastV, Stride
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import ZOO, Row

ROWS = [Row(1, 3, 2), Row(2, 1, 3)]


@torch.library.custom_op("foreign::of_four_bits", mutates_args=())
def of_four_bits(x: Tensor, packed: Tensor, scales: Tensor, out: int, largest: bool) -> Tensor:
    """x @ W.T, of weights in 4 bits; ``largest`` rounds x to bits of its largest number, of all tokens together."""
    if largest:
        scale = x.abs().max() / 127
        x = (x / scale).round() * scale
    return x @ plain(packed, scales, out).to(x.dtype).T


@of_four_bits.register_fake
def _(x, packed, scales, out, largest):
    return x.new_empty((*x.shape[:-1], out))


library = torch.library.Library("foreign", "FRAGMENT")
for name in ("without_gradient", "bent"):
    library.define(f"{name}(Tensor x, Tensor packed, Tensor scales, int out, bool largest) -> Tensor")

    @torch.library.register_fake(f"foreign::{name}")
    def _(x, packed, scales, out, largest):
        return x.new_empty((*x.shape[:-1], out))


@torch.library.impl(library, "without_gradient", "CPU")
def _(x, packed, scales, out, largest):
    return x @ plain(packed, scales, out).to(x.dtype).T


@torch.library.impl(library, "bent", "CPU")
def _(x, packed, scales, out, largest):
    return (x @ plain(packed, scales, out).to(x.dtype).T).relu()


def _keep(ctx, inputs, output):
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.out = inputs[3]


def _back(ctx, grad):
    return grad @ plain(*ctx.saved_tensors, ctx.out), None, None, None, None


of_four_bits.register_autograd(_back, setup_context=_keep)


def plain(packed, scales, out):
    codes = torch.stack([packed & 15, packed >> 4], -1).view(out, -1).to(scales.dtype)
    return (codes - 8) * scales


class FourBits(nn.Module):
    """A linear map of a library that nobody knows."""

    def __init__(self, like: nn.Linear, largest: bool = False, buffers: bool = False, by: str = "of_four_bits") -> None:
        super().__init__()
        self.out_features, self.in_features = like.weight.shape
        self.largest, self.bias, self.by = largest, like.bias, by
        scales = like.weight.detach().abs().amax(1, keepdim=True) / 7
        codes = (like.weight.detach() / scales).round().to(torch.uint8).add(8).bitwise_and(15).view(-1, 2)
        packed = codes[:, :1] | (codes[:, 1:] << 4)
        if buffers:
            self.register_buffer("packed", packed)
            self.register_buffer("scales", scales)
        else:
            self.packed = nn.Parameter(packed, requires_grad=False)
            self.scales = nn.Parameter(scales, requires_grad=False)

    def forward(self, x):
        y = getattr(torch.ops.foreign, self.by)(x, self.packed, self.scales, self.out_features, self.largest)
        return y if self.bias is None else y + self.bias


def quantised(name="llava", **how):
    tiny = ZOO[name](layers=4)
    exchange_linear(tiny.model.get_decoder(), lambda linear: FourBits(linear, **how))
    return tiny


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_recipes_agree_with_the_oracle(name):
    tiny = quantised(name)
    inputs = tiny.inputs(ROWS, side="left")
    for passes in ([Stride(keep=0.5)], [STS(keep=5, refine=3, at=1)], [FastV(keep=0.5, at=1), VISOR([0], [2])]):
        forward_agreement(tiny.model, inputs, passes).check()
    generation_agreement(tiny.model, inputs, [STS(keep=5, refine=3, at=1)]).check()


@pytest.mark.slow
def test_tokens_that_are_rounded_together_are_refused():
    """Among others, a token would come out otherwise: the loudest of all decides how it is rounded."""
    tiny = quantised(largest=True)
    with pytest.raises(ValueError, match=r"foreign.of_four_bits.* tokens that were left out changed what came out for"):
        forward_agreement(tiny.model, tiny.inputs(ROWS), Stride(keep=0.5))


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("buffers", [False, True])
def test_a_copy_that_is_trained_has_plain_weights(buffers):
    tiny = quantised(buffers=buffers)
    inputs = tiny.inputs(ROWS, side="left")
    with pytest.warns(UserWarning, match=r"layer 2 is quantised.*0.0352 MiB of plain weights"):
        vr.apply(tiny.model, DPVR(at=2))
    block = tiny.model.vlmrewrite_blocks["dpvr"]
    assert {type(m) for m in block.modules() if hasattr(m, "in_features")} == {nn.Linear}
    assert all(p.requires_grad and p.is_floating_point() for p in block.parameters())
    kept = tiny.model.get_decoder().layers[2].mlp.down_proj
    torch.testing.assert_close(block.mlp.down_proj.weight, plain(kept.packed, kept.scales, kept.out_features))
    loss = tiny.model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
    assert block.mlp.down_proj.weight.grad.abs().max() > 0
    vr.restore(tiny.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forward_agreement(tiny.model, inputs, DPVR(at=2)).check()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:layer .* is quantised")
def test_a_linear_map_without_a_gradient_gets_one():
    """PyTorch would leave the gradient out and warn; the branch before it would learn nothing of what it should."""
    found = []
    for by in ("without_gradient", "of_four_bits"):  # the same map; the second has its own gradient
        tiny = quantised(by=by)
        inputs = tiny.inputs(ROWS, side="left")
        with vr.applied(tiny.model, DPVR(at=1)):
            tiny.model(**inputs, labels=inputs["input_ids"]).loss.backward()
            found.append([p.grad for p in tiny.model.vlmrewrite_blocks.parameters()])
    assert max(g.abs().max() for g in found[1]) > 0
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:layer .* is quantised")
def test_what_has_no_gradient_and_is_not_linear_is_not_trained_through():
    tiny = quantised(by="bent")
    inputs = tiny.inputs(ROWS, side="left")
    with vr.applied(tiny.model, DPVR(at=1)):
        tiny.model.requires_grad_(False)
        expected = tiny.model(**inputs).logits
        tiny.model.vlmrewrite_blocks.requires_grad_(True)
        with pytest.raises(NotImplementedError, match=r"bent.default has no gradient, .* it is no linear map"):
            tiny.model(**inputs)
        with torch.no_grad():
            torch.testing.assert_close(tiny.model(**inputs).logits, expected)


def test_weights_that_are_no_linear_map_cannot_be_copied():
    block = nn.Sequential(nn.Linear(2, 2), nn.Module())
    block[1].table = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"1: expected weights that can be trained.* got a Module whose table"):
        dequantise(block)


class Adapted(nn.Module):
    """A wrapper of PEFT's form."""

    def __init__(self, model):
        super().__init__()
        self.base_model = model

    def get_base_model(self):
        return self.base_model

    def forward(self, **inputs):
        return self.base_model(**inputs)


@pytest.mark.slow
@torch.no_grad()
def test_a_wrapper_is_taken_for_the_model_in_it():
    tiny = ZOO["llava"](layers=4)
    wrapped, inputs = Adapted(tiny.model), tiny.inputs(ROWS, side="left")
    assert vr.apply(wrapped, Stride(keep=0.5)) is wrapped
    assert len(vr.kept_tokens(wrapped) if wrapped(**inputs) else []) == 1
    assert vr.report(wrapped).graphs["captured"] == 1
    assert vr.verify(wrapped, inputs) < 1e-4
    assert vr.restore(wrapped) is wrapped
    with vr.applied(wrapped, Stride(keep=0.5)) as given:
        assert given is wrapped
    assert vr.trace(wrapped, inputs).model is tiny.model
    assert vr.verify(wrapped, inputs, "sts-half") < 1e-4
