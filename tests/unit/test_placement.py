"""Weights that are not all in one place are refused before anything is changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import nn
from transformers import AutoModelForImageTextToText

import vlmrewrite as vr
from vlmrewrite.testing.models import FAMILIES


class OnAnotherGPU(nn.Parameter):
    device = "cuda:1"


def test_layers_on_several_devices() -> None:
    """As a device_map with several entries leaves them."""
    model = FAMILIES["llava"]().model
    layer = model.get_decoder().layers[1].mlp
    layer.gate_proj.weight = OnAnotherGPU(layer.gate_proj.weight.detach())
    before = dict(vars(model))
    message = (
        "^LlavaForConditionalGeneration cannot be rewritten: its decoder's parameters are on cpu and cuda:1: expected"
    )
    with pytest.raises(ValueError, match=message):
        vr.apply(model, "sts-half")
    assert vars(model) == before


@pytest.mark.parametrize(
    ("away", "said"),
    [
        ("model.language_model", r"model\.language_model\.embed_tokens\.weight is offloaded, and brought only while"),
        ("model.vision_tower", "its device_map puts parts on cpu and disk: expected the whole model on one device$"),
    ],
)
def test_parts_on_several_devices(away: str, said: str, tmp_path: Path) -> None:
    """As accelerate leaves them, which puts hooks on all modules, the model itself among them."""
    FAMILIES["llava"]().model.save_pretrained(tmp_path / "model")
    parts = dict.fromkeys(
        ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"), "cpu"
    )
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=parts | {away: "disk"}, offload_folder=tmp_path / "disk"
    )
    with pytest.raises(ValueError, match="^LlavaForConditionalGeneration cannot be rewritten: " + said):
        vr.apply(model, "sts-half")
