"""Linear maps as GPTQ and AWQ store them, in the ways that libraries run them: seen by Dynamo, or not."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import nn

import vlmrewrite as vr
from tests.small import exchange_linear, losses
from vlmrewrite.errors import CaptureError
from vlmrewrite.hf import dequantise
from vlmrewrite.passes import DPVR, STS, VISOR, FastV, Stride
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import ZOO, Row

ROWS = [Row(1, 3, 2), Row(2, 1, 3)]
GROUP, EVERYTHING = 8, Stride(keep=1_000_000)
SHIFTS = 4 * torch.arange(8)


def packed(numbers, dim):
    """Eight of 4 bits in each int32."""
    words = (numbers.movedim(dim, -1).unflatten(-1, (-1, 8)).long() << SHIFTS).sum(-1)
    return words.where(words < 2**31, words - 2**32).int().movedim(-1, dim).contiguous()


def unpacked(words, dim):
    return (words.movedim(dim, -1)[..., None] >> SHIFTS.to(words.device) & 15).flatten(-2).movedim(-1, dim)


class Packed(nn.Module):
    """As in a GPTQ checkpoint: int32 of 4 bits, a scale and a zero for each group of inputs and each output."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = like.weight.shape
        w = like.weight.detach().T.unflatten(0, (-1, GROUP))
        scales = (w.amax(1) - w.amin(1)) / 15
        zeros = (-w.amin(1) / scales).round().clamp(0, 15)
        numbers = (w / scales[:, None] + zeros[:, None]).round().clamp(0, 15).flatten(0, 1)
        self.register_buffer("qweight", packed(numbers, 0))
        self.register_buffer("qzeros", packed(zeros, 1))
        self.register_buffer("scales", scales)
        self.register_buffer("g_idx", (torch.arange(self.in_features) // GROUP).int())
        self.register_buffer("bias", None if like.bias is None else like.bias.detach())

    def weights(self):
        at = self.g_idx.long()
        return (unpacked(self.qweight, 0) - unpacked(self.qzeros, 1)[at]) * self.scales[at]

    def forward(self, x):
        shape = x.shape[:-1] + (self.out_features,)  # noqa: RUF005 - a torch.Size
        out = (x.reshape(-1, x.shape[-1]) @ self.weights().to(x.dtype)).reshape(shape)
        return out if self.bias is None else out + self.bias


class Prepared(Packed):
    """Looks at its numbers in its first call, and keeps what it made of them as long as its tensors are the same."""

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like)
        self.known, self.made = None, None

    def weights(self):
        if self.known != (key := (self.qweight.data_ptr(), self.qweight.is_inference(), self.scales.dtype)):
            ordered = torch.equal(self.g_idx, self.g_idx.sort().values)
            self.known, self.made = key, super().weights() if ordered else None
        return self.made


class Loudest(Prepared):
    """Rounds all tokens by the largest of them."""

    def forward(self, x):
        scale = x.abs().max() / 127
        return super().forward((x / scale).round() * scale)


class Half(Prepared):
    """Gives another dtype than it takes."""

    def forward(self, x):
        return super().forward(x).half()


def quantised(kind, name="llava"):
    tiny = ZOO[name](layers=4)
    exchange_linear(tiny.model.get_decoder(), kind)
    return tiny


def logits(model, inputs):
    return model(**inputs).logits[inputs["attention_mask"].bool()]


KINDS = [Packed, Prepared]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.filterwarnings("ignore:layer .* is quantised")
def test_recipes_agree_with_the_oracle(kind, name):
    tiny = quantised(kind, name)
    inputs = tiny.inputs(ROWS, side="left")
    for passes in ([STS(keep=5, refine=3, at=1)], [FastV(keep=0.5, at=1), VISOR([0], [2])], [DPVR(at=2)]):
        forward_agreement(tiny.model, inputs, passes).check()
    generation_agreement(tiny.model, inputs, [STS(keep=5, refine=3, at=1)]).check()
    greedy = {"do_sample": False, "max_new_tokens": 4}
    expected = tiny.model.generate(**inputs, **greedy)
    with vr.applied(tiny.model, EVERYTHING):
        assert torch.equal(tiny.model.generate(**inputs, **greedy), expected)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_what_is_kept_whole_is_left_as_it_was(backend):
    tiny = quantised(Prepared)
    inputs = tiny.inputs(ROWS)
    keys, buffers = [*tiny.model.state_dict()], [name for name, _ in tiny.model.named_buffers()]
    expected = logits(tiny.model, inputs)
    vr.apply(tiny.model, EVERYTHING, backend=backend)
    torch.testing.assert_close(logits(tiny.model, inputs), expected, atol=1e-4, rtol=1e-4)
    linear = tiny.model.get_decoder().layers[0].mlp.up_proj
    assert "forward" in vars(linear)
    assert [*tiny.model.state_dict()] == keys
    copied = copy.deepcopy(tiny.model)
    vr.restore(tiny.model)
    assert "forward" not in vars(linear) and not any(name.startswith("vlmrewrite") for name in vars(linear))
    assert [name for name, _ in tiny.model.named_buffers()] == buffers
    copied.get_decoder().layers[0].mlp.up_proj.scales.mul_(2)
    copied.get_decoder().layers[0].mlp.up_proj.known = None
    changed = logits(vr.restore(copy.deepcopy(copied)), inputs)
    assert (changed - expected).abs().max() > 1e-2
    torch.testing.assert_close(logits(copied, inputs), changed, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_model_without_a_recipe_is_traced_and_left_as_it_was():
    tiny = quantised(Prepared)
    inputs = tiny.inputs(ROWS)
    program = vr.trace(tiny.model, inputs)
    assert any("whole" in node.name for node in program.graph_module.graph.nodes)
    assert not any("vlmrewrite" in name for m in tiny.model.modules() for name in (*vars(m), *m._buffers))
    assert vr.verify(tiny.model, inputs, [STS(keep=5, refine=3, at=1)]) < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_a_model_with_maps_kept_whole_is_moved():
    tiny = quantised(Prepared)
    inputs = tiny.inputs(ROWS)
    vr.apply(tiny.model, EVERYTHING)
    tiny.model(**inputs)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    for module in tiny.model.double().modules():
        if "vlmrewrite_handle" in module._buffers:  # as a move to another device would leave it
            module._buffers["vlmrewrite_handle"] = module._buffers["vlmrewrite_handle"].clone()
    got = logits(tiny.model, inputs)
    torch.testing.assert_close(got, logits(vr.restore(tiny.model), inputs), atol=1e-9, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:layer .* is quantised")
def test_the_same_is_learned_through_both():
    """One is differentiated by PyTorch; the other by what it does to the unit vectors."""
    found = []
    for kind in KINDS:
        tiny = quantised(kind)
        inputs = tiny.inputs(ROWS)
        with vr.applied(tiny.model, DPVR(at=1)):
            learning = [p for p in tiny.model.parameters() if p.requires_grad]
            found.append(losses(tiny.model, inputs, learning, 0.03, 3))
    assert found[0][0] > found[0][1] > found[0][2]
    assert found[1] == pytest.approx(found[0], rel=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_forward_that_was_exchanged_on_a_linear_map_is_called():
    tiny = ZOO["llava"](layers=4)
    inputs = tiny.inputs(ROWS)

    def exchanged(linear, x):
        assert not linear.weight.is_inference()  # which Dynamo does not tell
        return F.linear(x, linear.weight * 2, linear.bias)

    maps = [m for m in tiny.model.get_decoder().modules() if type(m) is nn.Linear][:3]
    for linear in maps:
        linear.forward = functools.partial(exchanged, linear)
    own = [linear.forward for linear in maps]
    expected = logits(tiny.model, inputs)
    forward_agreement(tiny.model, inputs, [STS(keep=5, refine=3, at=1)]).check()
    with vr.applied(tiny.model, EVERYTHING):
        torch.testing.assert_close(logits(tiny.model, inputs), expected, atol=1e-4, rtol=1e-4)
    assert [linear.forward for linear in maps] == own


@pytest.mark.slow
@torch.no_grad()
def test_maps_that_mix_tokens_or_change_the_dtype_are_refused():
    tiny = quantised(Loudest)
    with pytest.raises(
        ValueError, match=r"vlmrewrite.whole of model\S+_proj is .*: tokens that were left out changed what came out"
    ):
        forward_agreement(tiny.model, tiny.inputs(ROWS), Stride(keep=0.5))
    tiny = quantised(Half)
    with vr.applied(tiny.model, EVERYTHING), pytest.raises((TypeError, ValueError, CaptureError), match="float16"):
        tiny.model(**tiny.inputs(ROWS))


def test_what_a_map_with_a_module_in_it_stands_for():
    block = nn.Sequential(nn.Linear(16, 16), Packed(nn.Linear(16, 24)))
    block[1].kernel = nn.Module()
    block[1].kernel.register_buffer("packed", block[1].qweight)
    weights, x = block[1].weights(), torch.randn(3, 16)
    expected = block(x)
    assert dequantise(block) == 4 * 24 * 17
    assert type(block[1]) is nn.Linear
    torch.testing.assert_close(block[1].weight, weights.T)
    torch.testing.assert_close(block(x), expected)


@pytest.mark.slow
@torch.no_grad()
def test_operators_of_pytorch_itself_are_tried():
    """One that multiplies by 4 bits: no rule says what it does to tokens."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        pytest.skip("this PyTorch has no such operator")

    class OfPyTorch(nn.Module):
        def __init__(self, like):
            super().__init__()
            self.out_features, self.in_features = like.weight.shape
            scales = like.weight.detach().abs().amax(1) / 7
            numbers = (like.weight.detach() / scales[:, None]).round().add(8).int()
            self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1))
            self.register_buffer("scales", torch.stack([scales, 0 * scales], -1)[None].contiguous())

        def forward(self, x):
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.flatten(0, -2), self.packed, 32, self.scales)
            return y.unflatten(0, x.shape[:-1])

    tiny = ZOO["llava"](layers=4)
    exchange_linear(tiny.model.get_decoder(), lambda old: OfPyTorch(old) if old.in_features == 32 else old)
    forward_agreement(tiny.model, tiny.inputs(ROWS), [STS(keep=5, refine=3, at=1)]).check()


@pytest.mark.slow
@torch.no_grad()
def test_parameters_are_inputs_where_inductor_is_asked_to_freeze_them():
    """As libraries ask it to, for the whole process."""
    tiny = ZOO["llava"](layers=3, seed=5)
    with torch._inductor.config.patch(freezing=True):
        forward_agreement(tiny.model, tiny.inputs(ROWS), [DPVR(at=2)]).check()
