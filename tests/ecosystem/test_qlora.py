"""LoRA on weights of 4 and 8 bits, trained under a recipe."""

from __future__ import annotations

import pytest
import torch

import vlmrewrite as vr
from tests.ecosystem.test_quantised import quantised
from tests.small import losses
from vlmrewrite.passes import STS, Stride
from vlmrewrite.testing.models import Row

peft = pytest.importorskip("peft")
ROWS = [Row(1, 3, 2), Row(2, 1, 3)]


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was")
@pytest.mark.parametrize(
    "way", ["bitsandbytes, 4 bits", "bitsandbytes, 8 bits", "torchao, int4 weights", "HQQ, 4 bits"]
)
def test_adapters_learn_on_quantised_weights(way):
    tiny = quantised(way)
    model = peft.get_peft_model(tiny.model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    inputs, learning = tiny.inputs(ROWS), [p for p in model.parameters() if p.requires_grad]

    def gradients():
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        found = [p.grad for p in learning]
        model.zero_grad(set_to_none=True)
        return found

    expected = gradients()
    with vr.applied(model, [Stride(keep=1_000_000)]):
        torch.testing.assert_close(gradients(), expected, atol=1e-4, rtol=1e-3)
    with vr.applied(model, [STS(keep=5, refine=3, at=1)]):
        seen = losses(model, inputs, learning, 0.5, 5)
    assert seen[-1] < seen[0]
    assert all(torch.isfinite(p).all() for p in learning)
