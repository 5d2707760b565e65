"""Checkpoints that compressed-tensors reads, as llm-compressor writes them: 8 and 4 bit integers, 8 bit floats."""

from __future__ import annotations

import pytest
import torch
from transformers import CompressedTensorsConfig, LlavaForConditionalGeneration

import vlmrewrite as vr
from vlmrewrite.errors import CaptureError
from vlmrewrite.passes import STS, FastV, Stride
from vlmrewrite.testing.models import ZOO, Row

quantization = pytest.importorskip("compressed_tensors.quantization")
compressors = pytest.importorskip("compressed_tensors.compressors")
offload = pytest.importorskip("compressed_tensors.offload")

pytestmark = pytest.mark.filterwarnings("ignore:You passed .quantization_config.:UserWarning")
CHANNEL, GROUP = {"strategy": "channel"}, {"strategy": "group", "group_size": 8}
KINDS = {
    "int-quantized": ({"num_bits": 8, "type": "int", **CHANNEL}, 127),
    "pack-quantized": ({"num_bits": 4, "type": "int", **GROUP}, 7),
    "float-quantized": ({"num_bits": 8, "type": "float", **CHANNEL}, 448),
}
TINY = ZOO["llava"](layers=3)


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A checkpoint whose decoder's linear maps are quantised, each row or group by its largest weight."""
    arguments, largest = KINDS[request.param]
    model, path = ZOO["llava"](layers=3).model, tmp_path_factory.mktemp("compressed")
    weights = quantization.QuantizationArgs(symmetric=True, **arguments)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=weights)
    ignore = ["lm_head", "re:.*vision_tower.*", "re:.*multi_modal.*"]
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=ignore, format=request.param, quantization_status="initialized"
    )
    quantization.apply_quantization_config(model, config)
    for module in (m for m in model.modules() if hasattr(m, "weight_scale")):
        groups = module.weight.unflatten(1, (-1, 8)) if "group_size" in arguments else module.weight[:, None]
        module.weight_scale.data = groups.detach().abs().amax(2) / largest
        module.quantization_status = quantization.QuantizationStatus.FROZEN
    compressor = compressors.ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(path)
    compressor.update_config(path)
    return path


def loaded(folder, run_compressed):
    how = CompressedTensorsConfig(run_compressed=run_compressed)
    return LlavaForConditionalGeneration.from_pretrained(folder, quantization_config=how).eval()


def agrees(model, inputs):
    """Recipes with the oracle, and keeping all tokens with the model itself; what is given to `generate()`."""
    for recipe in ([STS(keep=6, refine=3, at=1)], [FastV(at=1, keep=4)]):
        assert vr.verify(model, inputs, recipe) < 1e-4
    how = inputs | {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**how)
    with vr.applied(model, [Stride(1.0)]):
        assert torch.equal(model.generate(**how), expected)
    return how, expected


@torch.no_grad()
def test_weights_that_are_unpacked_as_they_are_loaded(folder):
    model, inputs = loaded(folder, False), TINY.inputs([Row(1, 3, 4), Row(2, 1, 2)], side="left", seed=1)
    how, expected = agrees(model, inputs)
    with vr.applied(model, "sts-half"):
        assert model.generate(**how).shape == expected.shape


@torch.no_grad()
def test_weights_that_are_unpacked_by_the_first_call(folder):
    """What the library keeps around every module since is refused, until it is taken off; its linear maps' stays."""
    model, inputs = loaded(folder, True), TINY.inputs([Row(1, 3, 4), Row(2, 1, 2)], side="left", seed=1)
    vr.apply(model, "sts-half")
    with pytest.raises(CaptureError, match=r"the forward of \S+ was exchanged on the instance"):
        model(**inputs)
    vr.restore(model)
    assert model(**inputs).logits.isfinite().all()
    offload.remove_dispatch(model, onload_tensors=True)
    assert "forward" in vars(model.get_decoder().layers[0].mlp.up_proj)
    agrees(model, inputs)
