"""Weights on several devices without hooks are refused before anything is changed; some may be on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

import vlmrewrite as vr
from vlmrewrite.testing.models import FAMILIES, Row


class OnAnotherGPU(nn.Parameter):
    device = "cuda:1"


def test_layers_on_several_devices() -> None:
    """As somebody put them there; what accelerate does about that is in tests/graph/test_devices.py."""
    model = FAMILIES["llava"]().model
    layer = model.get_decoder().layers[1].mlp
    layer.gate_proj.weight = OnAnotherGPU(layer.gate_proj.weight.detach())
    before = dict(vars(model))
    message = "^LlavaForConditionalGeneration cannot .*: its deco.* are on cpu and cuda:1, and no hooks on"
    with pytest.raises(ValueError, match=message):
        vr.apply(model, "sts-half")
    assert vars(model) == before


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("away", ["model.language_model", "model.vision_tower"])
def test_parts_on_disk(away: str, tmp_path: Path) -> None:
    """As from_pretrained leaves them, with hooks of accelerate on all modules, the model itself among them."""
    tiny = FAMILIES["llava"]()
    inputs = tiny.inputs([Row(1, 3, 4)])
    with vr.applied(tiny.model, "sts-half"):
        expected = tiny.model(**inputs).logits
    tiny.model.save_pretrained(tmp_path / "model")
    parts = dict.fromkeys(
        ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"), "cpu"
    )
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=parts | {away: "disk"}, offload_folder=tmp_path / "disk"
    )
    with vr.applied(model, "sts-half"):
        torch.testing.assert_close(model(**inputs).logits, expected)
