"""Layers whose cache holds a latent of each token, which keys and values are made of (multi-head latent attention)."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV3Config, DynamicCache, Glm4MoeLiteConfig, MiniCPM3Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

import vlmrewrite as vr
from tests.small import ONE_EACH, crossed
from vlmrewrite.oracle import layer_masks, oracle_logits
from vlmrewrite.passes import Stride
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import ZOO, Row, TinyVLM
from vlmrewrite.testing.models.families import llava_of
from vlmrewrite.testing.models.tiny import HIDDEN, decoder_sizes

ROWS = [Row(1, 3, 2), Row(2, 1, 3), Row(0, 4, 1)]

RANKS = {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}

EXPERTS = {"moe_intermediate_size": HIDDEN, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}

OWN = {
    "deepseek_v2": (
        DeepseekV2Config,
        {"q_lora_rank": None, "n_routed_experts": 4, "first_k_dense_replace": 1} | EXPERTS,
    ),
    "deepseek_v3": (
        DeepseekV3Config,
        {"q_lora_rank": 16, "n_routed_experts": 4, "first_k_dense_replace": 1, "rope_interleave": False} | EXPERTS,
    ),
    "glm4_moe_lite": (Glm4MoeLiteConfig, {"q_lora_rank": 16, "n_routed_experts": 4, "n_shared_experts": 1} | EXPERTS),
    "minicpm3": (MiniCPM3Config, {"q_lora_rank": 16}),
}
"""Decoders of the kind beside those of the families that have a builder."""


@functools.cache
def tiny(name: str) -> TinyVLM:
    if name not in OWN:
        return ZOO[name](layers=3)
    config, own = OWN[name]
    sizes = decoder_sizes(3, **RANKS, **own) | {"num_key_value_heads": 4}
    return llava_of(name, config(**sizes), 0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), crossed([*OWN, "kimi_k25"], ONE_EACH))
def test_a_recipe_agrees_with_the_oracle(name: str, recipe: str) -> None:
    model, inputs = tiny(name).model, tiny(name).inputs(ROWS)
    forward_agreement(model, inputs, ONE_EACH[recipe]).check()
    generation_agreement(model, inputs, ONE_EACH[recipe], new_tokens=3).check()


def test_the_cache_holds_latents_and_is_counted_so() -> None:
    model, inputs = tiny("deepseek_v3").model, tiny("deepseek_v3").inputs([Row(1, 3, 2)])
    program, tokens = vr.trace(model, inputs), inputs["input_ids"].shape[1]
    assert {(x.heads, x.kv_heads, x.head_size, x.value_size) for x in program.anatomy.layers} == {(4, 4, 12, 8)}
    assert {cost.kv_bytes for cost in program.costs(program.call.counts)} == {tokens * (12 + 4) * 4}
    with torch.no_grad(), vr.applied(model, [Stride(0.5)]):
        layers = model(**inputs).past_key_values.layers
    assert {(*x.keys.shape, x.values.shape[-1]) for x in layers} == {(1, 1, tokens - 8, 12, 4)}
    expanding = program.anatomy.layers[0]
    assert any(n.name.startswith("linear") for n in expanding.keys.keys() & expanding.values.keys())


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("name", "recipe"), crossed(["deepseek_v3", "minicpm3"], ["fastv", "visor"]))
def test_images_on_a_kept_cache(name: str, recipe: str) -> None:
    """What is held is expanded with what is new: both turns are those of one sequence under their masks."""
    model, cache = tiny(name).model, DynamicCache()
    first = tiny(name).inputs([Row(1, 2, 3), Row(2, 1, 2)], seed=1)
    then = tiny(name).inputs([Row(1, 4, 2), Row(1, 1, 2)], seed=2)
    mask = torch.cat([first["attention_mask"], then["attention_mask"]], 1)
    with vr.applied(model, ONE_EACH[recipe]):
        model(**first, past_key_values=cache)
        masks = layer_masks(model)
        got = model(**then | {"attention_mask": mask}, past_key_values=cache).logits
        joined = [
            dataclasses.replace(a, **{x: torch.cat([getattr(a, x), getattr(b, x)], 1) for x in ("run", "keys")})
            for a, b in zip(masks, layer_masks(model), strict=True)
        ]
    one, two = first["pixel_values"], then["pixel_values"]
    pixels = torch.cat([one[:1], two[:1], one[1:], two[1:]])  # row by row
    ids = torch.cat([first["input_ids"], then["input_ids"]], 1)
    expected = oracle_logits(model, {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}, joined)
    real = then["attention_mask"].bool()
    expected = expected[:, -real.shape[1] :][real]
    assert float((got[real] - expected).abs().max()) < 1e-4 * float(expected.abs().max())


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_decode_step_finds_the_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs that Inductor would get, run without it."""
    monkeypatch.setattr("vlmrewrite.lower.pieces.inductor", lambda gm: gm)
    model, inputs = tiny("minicpm3").model, tiny("minicpm3").inputs(ROWS)
    how = {"do_sample": False, "max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    found = []
    for backend in ("eager", "inductor"):
        with vr.applied(model, ONE_EACH["sts"], backend=backend):
            found.append(model.generate(**inputs, **how))
    eager, compiled = found
    assert torch.equal(eager.sequences, compiled.sequences)
    scale = float(torch.stack(eager.logits).abs().max())
    assert all(float((a - b).abs().max()) < 1e-4 * scale for a, b in zip(eager.logits, compiled.logits, strict=True))


class Held(LlamaAttention):
    """Makes keys of what the cache holds, in one of several ways."""

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (f(hidden_states).view(shape).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None and not self.shares:
            k, v = past_key_values.update(k, v, self.layer_idx)
        k = k / (k.norm(dim=-1, keepdim=True) + 1)
        if self.counts:
            k = k * (1 + torch.arange(k.shape[2])[None] / 20)[:, None, :, None]
        k, v = self.store.pop() if self.shares else (k, v)
        self.store.extend([(k, v)] * self.lends)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attend(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), weights


def holding(counts=False, shares=False):
    made, store = ZOO["llava"](layers=3), []
    for i, layer in enumerate(made.model.get_decoder().layers):
        own = layer.self_attn
        own.__class__, own.store, own.counts = Held, store, counts
        own.shares, own.lends = shares and i == 1, shares and i == 0
    return made


@pytest.mark.parametrize("recipe", ["stride", "fastv", "visor"])
def test_keys_that_are_made_of_what_is_held_alone(recipe):
    made = holding()
    generation_agreement(made.model, made.inputs(ROWS), ONE_EACH[recipe], new_tokens=3).check()


def test_places_of_held_keys_are_no_positions():
    made = holding(counts=True)
    with pytest.raises(ValueError, match="makes keys or values of what the cache holds and of .* tokens of its own"):
        forward_agreement(made.model, made.inputs(ROWS), ONE_EACH["stride"])


@pytest.mark.slow
def test_a_layer_that_attends_to_what_another_made_of_its_keys_is_refused():
    made = holding(shares=True)
    with pytest.raises(ValueError, match="layer 1 attends to what layer 0 made of the keys that it holds"):
        forward_agreement(made.model, made.inputs(ROWS), ONE_EACH["stride"])
