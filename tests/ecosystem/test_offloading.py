"""What accelerate does to a model, before and after a recipe is applied to it."""

from __future__ import annotations

import pytest
import torch

import vlmrewrite as vr
from vlmrewrite.passes import Stride
from vlmrewrite.testing.models import FAMILIES, Row

pytest.importorskip("peft")  # of the environment that `make ecosystem` makes
accelerate = pytest.importorskip("accelerate")

SOME = [Stride(0.5)]
CPU = torch.device("cpu")
OFFLOADED = r"is offloaded, and brought only while its module runs: expected all weights on one device"


def split(model, folder):
    names = ["vision_tower", "multi_modal_projector", "language_model.embed_tokens", "language_model.layers.0",
             "language_model.norm", "language_model.rotary_emb"]  # fmt: skip
    places = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
    places |= {f"model.language_model.layers.{i}": "disk" for i in (1, 2)}
    accelerate.dispatch_model(model, places, offload_dir=str(folder), main_device="cpu")


WAYS = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, execution_device=CPU),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=CPU),
    "some layers": split,
}


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_offloading_is_refused_in_one_sentence(way, tmp_path):
    tiny = FAMILIES["llava"](layers=3)
    inputs = tiny.inputs([Row(1, 3, 4)])
    vr.apply(tiny.model, SOME)
    WAYS[way](tiny.model, tmp_path / "after")
    with pytest.raises(RuntimeError, match=OFFLOADED):
        tiny.model(**inputs)
    other = FAMILIES["llava"](layers=3).model
    WAYS[way](other, tmp_path / "before")
    with pytest.raises(ValueError, match=OFFLOADED):
        vr.apply(other, SOME)


@torch.no_grad()
@pytest.mark.parametrize("way", ["dispatch", "prepare"])
def test_one_device_is_as_without(way):
    tiny = FAMILIES["llava"](layers=3)
    inputs, model = tiny.inputs([Row(1, 3, 4)]), tiny.model
    with vr.applied(model, SOME):
        expected = model(**inputs).logits
    put = {
        "dispatch": lambda model: accelerate.dispatch_model(model, {"": "cpu"}),
        "prepare": lambda model: accelerate.Accelerator(cpu=True).prepare(model),
    }
    model = put[way](model)
    with vr.applied(model, SOME):
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(put[way](model)(**inputs).logits, expected)
