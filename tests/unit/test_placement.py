"""Weights that are not all in one place are refused before anything is changed."""

from __future__ import annotations

import pytest
from torch import nn

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
