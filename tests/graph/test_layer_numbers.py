"""Layers whose classes do something by the number of the layer are no copies of one another."""

from __future__ import annotations

import pytest
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention

from vlmrewrite.capture import captures_of
from vlmrewrite.hf import goes_by_number
from vlmrewrite.passes import Stride
from vlmrewrite.testing.agreement import forward_agreement
from vlmrewrite.testing.models import FAMILIES, Row

GAINS = [1.0, 2.0, 3.0, 4.0]


class Branches(LlamaAttention):
    def forward(self, hidden_states, *args, **kwargs):
        if self.layer_idx == 1:
            hidden_states = hidden_states * 2
        return super().forward(hidden_states, *args, **kwargs)


class Counts(LlamaAttention):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states / (1 + self.layer_idx % 2), *args, **kwargs)


class Takes(LlamaAttention):
    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states * GAINS[self.layer_idx % 2 + 1], *args, **kwargs)


class HandsOn(LlamaAttention):
    def forward(self, hidden_states, *args, **kwargs):
        if self.layer_idx is None:
            raise ValueError(f"no number: {self.layer_idx}")
        return super().forward(hidden_states, *args, **kwargs)


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("kind", [Branches, Counts, Takes, HandsOn])
def test_a_layer_that_goes_by_its_number_is_traced(kind):
    tiny = FAMILIES["llava"](layers=4)
    for layer in tiny.model.get_decoder().layers:
        layer.self_attn.__class__ = kind
    forward_agreement(tiny.model, tiny.inputs([Row(1, 3, 2), Row(2, 1, 3)]), [Stride(0.5)]).check()
    assert captures_of(tiny.model).call.copied == (2 if kind is HandsOn else 0)


def test_a_class_without_a_source_counts_as_one_that_does():
    assert goes_by_number(type("Made", (nn.Module,), {"__module__": "nowhere"}), "layer_idx")
    assert not goes_by_number(LlamaAttention, "layer_idx")
    assert not goes_by_number(nn.Linear, "in_features")
