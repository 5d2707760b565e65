"""A model whose decoder gets other layers between two recipes: nothing of the old ones is remembered."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vlmrewrite as vr
from vlmrewrite.hf import cache_states
from vlmrewrite.passes import Stride
from vlmrewrite.testing.models import ZOO, Row


def without_the_first(model: nn.Module) -> None:
    """Take the first decoder layer out, and let the others and the config know."""
    decoder = model.get_decoder()
    del decoder.layers[0]
    for config in (decoder.config, model.config.text_config):
        if config.num_hidden_layers > len(decoder.layers):
            config.layer_types = config.layer_types[1:]
            config.num_hidden_layers = len(decoder.layers)
    for i, layer in enumerate(decoder.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = i


def test_states_are_those_of_the_config_as_it_is() -> None:
    model = ZOO["qwen3_5"](layers=4).model
    depth, states, _ = cache_states(model)
    assert (depth, sorted(states)) == (4, [0, 1, 2])
    without_the_first(model)
    depth, states, _ = cache_states(model)
    assert (depth, sorted(states)) == (3, [0, 1])


@pytest.mark.slow
@torch.no_grad()
def test_a_recipe_on_a_model_that_lost_a_layer_since_another_one() -> None:
    tiny = ZOO["qwen3_5"](layers=4)
    fresh, how = copy.deepcopy(tiny.model), {"max_new_tokens": 4, "do_sample": False} | tiny.inputs([Row(1, 3, 4)])
    with vr.applied(tiny.model, [Stride(0.5)]):
        tiny.model.generate(**how)
    for model in (tiny.model, fresh):
        without_the_first(model)
    got = []
    for model in (tiny.model, fresh):
        with vr.applied(model, [Stride(0.5)]):
            got.append(model.generate(**how))
    assert torch.equal(*got)
