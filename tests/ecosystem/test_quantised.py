"""Linear maps of bitsandbytes and torchao, and recipes on them."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import vlmrewrite as vr
from tests.small import exchange_linear, losses
from vlmrewrite.passes import DPVR, STS, VISOR, FastV, Stride
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import FAMILIES, Row

ROWS = [Row(1, 3, 2), Row(2, 1, 3)]


def of_bits(bits):
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(old):
        sizes, biased = (old.in_features, old.out_features), old.bias is not None
        if bits == 8:
            new = bnb.nn.Linear8bitLt(*sizes, bias=biased, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(*sizes, bias=biased, compute_dtype=old.weight.dtype, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        new.bias = old.bias
        return new.to("cpu")

    return lambda decoder: exchange_linear(decoder, quantised)


def of_hqq():
    hqq = pytest.importorskip("hqq.core.quantize")

    def quantised(old):
        how = hqq.BaseQuantizeConfig(nbits=4, group_size=16)
        return hqq.HQQLinear(old, how, compute_dtype=old.weight.dtype, device="cpu")

    return lambda decoder: exchange_linear(decoder, quantised)


def by_torchao(config, **how):
    torchao = pytest.importorskip("torchao.quantization")
    if "group" in how:
        granularity = importlib.import_module("torchao.quantization.granularity")
        how["weight_granularity" if "Activation" in config else "granularity"] = granularity.PerGroup(how.pop("group"))
    return lambda decoder: torchao.quantize_(decoder, getattr(torchao, config)(**how))


WAYS = {
    "bitsandbytes, 4 bits": lambda: of_bits(4),
    "bitsandbytes, 8 bits": lambda: of_bits(8),
    "torchao, int8 weights": lambda: by_torchao("Int8WeightOnlyConfig"),
    "torchao, int8 weights and activations": lambda: by_torchao("Int8DynamicActivationInt8WeightConfig"),
    "torchao, float8 weights": lambda: by_torchao("Float8WeightOnlyConfig"),
    "torchao, int4 weights": lambda: by_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, group=16),
    "torchao, int4 weights, int8 activations": lambda: by_torchao(
        "Int8DynamicActivationIntxWeightConfig", weight_dtype=torch.int4, group=16
    ),
    "HQQ, 4 bits": of_hqq,
}


def quantised(way, name="llava"):
    tiny = FAMILIES[name](layers=4)
    WAYS[way]()(tiny.model.get_decoder())
    return tiny


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:layer .* is quantised")
def test_recipes_agree_with_the_oracle(way):
    tiny = quantised(way)
    inputs = tiny.inputs(ROWS, side="left")
    for p in (Stride(keep=0.5), STS(keep=5, refine=3, at=1), FastV(keep=0.5, at=1), VISOR([0], [2]), DPVR(at=2)):
        forward_agreement(tiny.model, inputs, p).check()
    generation_agreement(tiny.model, inputs, STS(keep=5, refine=3, at=1)).check()


@pytest.mark.parametrize("way", WAYS)
def test_keeping_all_is_the_quantised_model(way):
    tiny = quantised(way, "qwen2_5_vl")
    inputs, greedy = tiny.inputs(ROWS, side="left"), {"do_sample": False, "max_new_tokens": 4}
    expected = tiny.model.generate(**inputs, **greedy)
    with vr.applied(tiny.model, Stride(keep=1_000_000)):
        assert torch.equal(tiny.model.generate(**inputs, **greedy), expected)


@pytest.mark.parametrize("way", WAYS)
def test_the_branch_beside_quantised_layers_is_trained(way):
    tiny = quantised(way)
    inputs = tiny.inputs(ROWS)
    with pytest.warns(UserWarning, match="layer 2 is quantised"):
        vr.apply(tiny.model, DPVR(at=2))
    learning = [p for p in tiny.model.parameters() if p.requires_grad]
    assert all(type(p) is nn.Parameter for p in learning)
    seen = losses(tiny.model, inputs, learning, 0.03, 3)
    assert seen == sorted(seen, reverse=True)
    assert seen[-1] < seen[0]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "llava_qwen2"])
def test_inductor_agrees_with_eager(name):
    tiny = quantised("torchao, int8 weights", name)
    inputs, passes = tiny.inputs(ROWS, side="left"), [STS(keep=5, refine=3, at=1)]
    found = []
    for backend in ("eager", "inductor"):
        with vr.applied(tiny.model, passes, backend=backend):
            tokens = tiny.model.generate(**inputs, do_sample=False, max_new_tokens=4)
            found.append((tiny.model(**inputs).logits[inputs["attention_mask"].bool()], tokens))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-4)
    assert torch.equal(found[1][1], found[0][1])
