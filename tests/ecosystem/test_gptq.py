"""GPTQ and AWQ checkpoints, which transformers reads by gptqmodel, run by its kernels for CPUs."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText, AwqConfig, GPTQConfig

import vlmrewrite as vr
from tests.small import losses
from vlmrewrite.passes import DPVR, STS, FastV, Stride
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import ZOO, Row

gptqmodel = pytest.importorskip("gptqmodel")

pytestmark = pytest.mark.filterwarnings(
    "ignore:You passed .quantization_config.:UserWarning",
    "ignore:layer .* is quantised",
    "ignore:.*Implicitly cleaning up:ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
ROWS = [Row(1, 3, 2), Row(2, 1, 3)]
GROUP, EVERYTHING = 32, Stride(keep=1_000_000)
WAYS = {
    "GPTQ": ("gptq", "gptq_torch", torch.float32),
    "GPTQ, inputs in another order": ("gptq, ordered", "gptq_torch", torch.float32),
    "GPTQ, PyTorch's kernel": ("gptq", "gptq_torch_aten", torch.bfloat16),
    "AWQ": ("awq", "torch_awq", torch.float32),
    "AWQ, PyTorch's kernel": ("awq", "torch_fused_awq", torch.float32),
}


def packed(numbers, dim, order=range(8)):
    """Eight numbers of 4 bits in each int32."""
    parts = numbers.movedim(dim, -1).unflatten(-1, (-1, 8)).long()[..., [*order]]
    words = (parts << 4 * torch.arange(8)).sum(-1)
    return words.where(words < 2**31, words - 2**32).int().movedim(-1, dim).contiguous()


def stored(linear, kind):
    """What a checkpoint holds of a linear map; GPTQ's zeros are one less, and in an order of AWQ's own."""
    of_group = (torch.arange(linear.in_features) // GROUP).int()
    if "ordered" in kind:
        of_group = of_group[torch.randperm(linear.in_features, generator=torch.Generator().manual_seed(0))]
    w = linear.weight.detach().float().T
    groups = torch.stack([w[of_group == i] for i in range(int(of_group.max()) + 1)])
    low, high = groups.amin(1), groups.amax(1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales).round().clamp(1, 15)
    numbers = (w / scales[of_group] + zeros[of_group]).round().clamp(0, 15)
    if kind == "awq":
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        found = {"qweight": packed(numbers, 1, order), "qzeros": packed(zeros, 1, order), "scales": scales}
    else:
        found = {"qweight": packed(numbers, 0), "qzeros": packed(zeros - 1, 1), "scales": scales, "g_idx": of_group}
    return found if linear.bias is None else found | {"bias": linear.bias.detach().half()}


def saved(name, kind, path):
    """A checkpoint of a tiny model whose decoder's layers are quantised."""
    model = ZOO[name](layers=3).model
    layers = model.get_decoder().layers
    prefix = next(n for n, m in model.named_modules() if m is layers)
    for module in [*layers.modules()]:
        for child, linear in [*module.named_children()]:
            if isinstance(linear, nn.Linear):
                setattr(module, child, nn.Module())
                for tensor, x in stored(linear, kind).items():
                    getattr(module, child).register_buffer(tensor, x)
    model.save_pretrained(path)
    how = {"bits": 4, "group_size": GROUP, "sym": False, "quant_method": kind[:4].strip(","), "desc_act": False}
    if kind == "awq":
        others = [f"model.{part}" for part in ("vision_tower", "visual", "multi_modal_projector")]
        how |= {"zero_point": True, "version": "gemm", "modules_to_not_convert": ["lm_head", *others]}
    else:
        how |= {"block_name_to_quantize": prefix, "checkpoint_format": "gptq", "desc_act": "ordered" in kind}
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": how}))


@pytest.fixture(scope="module", autouse=True)
def _unfrozen():
    """One of the kernels sets Inductor's options for the whole process."""
    options = importlib.import_module("torch._inductor.config")
    before = options.freezing, options.max_autotune
    yield
    options.freezing, options.max_autotune = before


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Makes a model of a family, as it is when it has been read; and inputs."""
    folders = {}

    def loaded(way, name):
        kind, backend, dtype = WAYS[way]
        if (kind, name) not in folders:
            folders[kind, name] = tmp_path_factory.mktemp("packed")
            saved(name, kind, folders[kind, name])
        how = AwqConfig(backend=backend) if kind == "awq" else GPTQConfig(bits=4, backend=backend)
        model = AutoModelForImageTextToText.from_pretrained(
            folders[kind, name], dtype=dtype, quantization_config=how
        ).eval()
        inputs = ZOO[name](layers=3).inputs(ROWS, side="left")
        return model, inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}

    return loaded


@pytest.mark.parametrize("way", WAYS)
def test_recipes_agree_with_the_oracle(way, load):
    model, inputs = load(way, "llava")
    assert not isinstance(model.get_decoder().layers[0].mlp.up_proj, nn.Linear)
    for p in (STS(keep=5, refine=3, at=1), FastV(keep=0.5, at=1), DPVR(at=2)):
        forward_agreement(model, inputs, p).check()
    generation_agreement(model, inputs, STS(keep=5, refine=3, at=1)).check()


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_keeping_all_is_the_quantised_model(way, load):
    (model, inputs), greedy = load(way, "qwen2_vl"), {"do_sample": False, "max_new_tokens": 4}
    with vr.applied(model, EVERYTHING):  # before it has run: the kernels pack their numbers in their first call
        got = model.generate(**inputs, **greedy)
    assert torch.equal(got, model.generate(**inputs, **greedy))


@pytest.mark.parametrize("way", WAYS)
def test_the_branch_beside_quantised_layers_is_trained(way, load):
    model, inputs = load(way, "llava")
    with pytest.warns(UserWarning, match="layer 2 is quantised"):
        vr.apply(model, DPVR(at=2))
    learning = [p for p in model.parameters() if p.requires_grad]
    assert all(type(p) is nn.Parameter for p in learning)
    seen = losses(model, inputs, learning, 0.03, 3)
    assert seen[0] > seen[1] > seen[2]
