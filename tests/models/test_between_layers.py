"""What a decoder adds to the stream between its layers is added to tokens that bypass a layer too."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import LlamaModel
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

import vlmrewrite as vr
from vlmrewrite.passes import STS, VISOR, FastV
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import FAMILIES, ZOO, Row

ROWS = [Row(images=2, before=3, after=4), Row(images=1, before=5, after=2)]


class Adding(LlamaModel):
    """Adds the embeddings again behind every layer but the third, the last one included."""

    def forward(self, inputs_embeds, attention_mask=None, position_ids=None, past_key_values=None, **kwargs):
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(past, past + inputs_embeds.shape[1])[None]
        given = {"past_key_values": past_key_values, "position_ids": position_ids}
        mask = create_causal_mask(self.config, inputs_embeds, attention_mask, **given)
        x, rope = inputs_embeds, self.rotary_emb(inputs_embeds, position_ids)
        for i, layer in enumerate(self.layers):
            x = layer(x, attention_mask=mask, position_embeddings=rope, **given)
            x = x if i == 2 else x + inputs_embeds.tanh()
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


@pytest.fixture(scope="module")
def tiny():
    made = FAMILIES["llava"]()
    made.model.get_decoder().__class__ = Adding
    return made


@pytest.mark.wide
@pytest.mark.parametrize("recipe", [STS(keep=5, refine=3, at=1), FastV(), VISOR([0, 2], [3])], ids=repr)
def test_a_recipe_agrees_with_the_oracle(tiny, recipe):
    forward_agreement(tiny.model, tiny.inputs(ROWS), [recipe]).check()
    generation_agreement(tiny.model, tiny.inputs(ROWS), [recipe]).check()


@torch.no_grad()
def test_a_layer_ends_before_what_is_added(tiny):
    layers = vr.trace(tiny.model, tiny.inputs(ROWS)).anatomy.layers
    assert [a.exit is b.entry for a, b in itertools.pairwise(layers)] == [False, False, True]


@pytest.mark.wide
@pytest.mark.parametrize("name", ["qwen3_vl", "granite4_vision", "cohere_compass"])
def test_how_many_tokens_are_added_to_need_not_be_known(name):
    tiny = ZOO[name](layers=3)
    program = vr.trace(tiny.model, tiny.inputs(ROWS))
    assert "fastv" in str(vr.rewrite(program, FastV(keep=0.5, at=1), strict=True))
