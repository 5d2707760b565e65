"""Layers that attend to another layer's keys, with inputs of their own beside the stream."""

from __future__ import annotations

import functools
from typing import ClassVar

import pytest
import torch
from transformers import Gemma4Config, Gemma4ForConditionalGeneration, Llama4TextConfig

import vlmrewrite as vr
from tests.small import long
from vlmrewrite.passes import DPVR, STS, VISOR, VTW, FastV, Stride
from vlmrewrite.passes.visor.dispatch import Routed
from vlmrewrite.plan import frozen_pass
from vlmrewrite.plan.plan import Plan
from vlmrewrite.plan.tokens import All, Text
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import Row, families, tiny

ROWS = [Row(images=2, before=3, after=4), Row(images=1, before=5, after=2), Row(images=0, before=9, after=1)]
RECIPES = [
    Stride(0.5),
    Stride(0.5, at=2),
    STS(keep=5, refine=3, at=1),
    FastV(),
    FastV(at=4),
    DPVR(),
    VISOR([0, 2], [1]),
]
SQUARE = torch.cartesian_prod(torch.arange(4), torch.arange(4))


def pictures(counts, generator):
    pixels = torch.rand(sum(counts), 16, 48, generator=generator)
    ids = [tiny.START, *[tiny.IMAGE] * 4, tiny.END]
    return [ids] * len(pixels), {"pixel_values": pixels, "image_position_ids": SQUARE.repeat(len(pixels), 1, 1)}


@functools.cache
def gemma4(depth=6, shared=3, inputs=8, **more):
    kinds = ["sliding_attention", "full_attention"] * (depth // 2)
    sizes = {"head_dim": 8, "global_head_dim": 16, "sliding_window": 8, "layer_types": kinds}
    own = {"hidden_size_per_layer_input": inputs, "vocab_size_per_layer_input": tiny.VOCABULARY}
    tower = tiny.tower_sizes(position_embedding_size=16, pooling_kernel_size=2, head_dim=16, num_key_value_heads=2)
    config = Gemma4Config(
        text_config=tiny.decoder_sizes(depth, **sizes, **own, num_kv_shared_layers=shared, **more),
        vision_config=tower,
        audio_config=None,
        image_token_id=tiny.IMAGE,
        video_token_id=tiny.VIDEO,
        audio_token_id=7,
        tie_word_embeddings=False,
    )
    made = tiny.tiny_model("gemma4", Gemma4ForConditionalGeneration, config, pictures, 0, "mm_token_type_ids")
    for layer in made.model.get_decoder().layers:
        layer.layer_scalar.fill_(0.7)  # behind the last residual add: of the layer, and not of what bypasses it
    return made


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_a_recipe_agrees_with_the_oracle(recipe):
    model, inputs = gemma4().model, gemma4().inputs(ROWS)
    if long() or recipe != DPVR():  # a model with a branch is frozen, and captured anew
        forward_agreement(model, inputs, [recipe]).check()
    found = generation_agreement(model, inputs, [recipe])
    found.check()
    assert len(found.kv_lengths) == 3  # of the layers that have keys


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize(
    "variant",
    [
        {"shared": 1, "use_bidirectional_attention": "vision"},
        {"shared": 0, "inputs": tiny.HIDDEN},  # a layer's input looks like the stream
        {"shared": 0, "inputs": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ],
    ids=str,
)
def test_variants_agree_with_the_oracle(variant):
    made = gemma4(4, **variant)
    generation_agreement(made.model, made.inputs(ROWS), [Stride(0.5, at=2), FastV(keep=0.5, at=3)]).check()


@pytest.mark.slow
def test_attention_whose_scale_depends_on_positions_and_attention_in_chunks():
    kinds = {"layer_types": ["chunked_attention", "full_attention"] * 2, "no_rope_layers": [1, 0] * 2}
    tuned = {"attn_temperature_tuning": True, "floor_scale": 2, "attn_scale": 0.5, "attention_chunk_size": 8}
    sizes = tiny.decoder_sizes(4, intermediate_size_mlp=64, moe_layers=[], head_dim=8)
    of_llama4 = families.llava_of("llama4", Llama4TextConfig(**sizes, **kinds, **tuned), 0)
    generation_agreement(of_llama4.model, of_llama4.inputs(ROWS), [Stride(0.5, at=1), FastV(keep=3, at=2)]).check()


@pytest.mark.slow
def test_a_turn_on_a_kept_cache_and_logits_of_some_tokens():
    model, inputs = gemma4().model, gemma4().inputs(ROWS)
    with torch.no_grad(), vr.applied(model, [Stride(0.5, at=2)]):
        every = model(**inputs).logits
        for n in (1, 3) if long() else (3,):  # generate() asks for one
            torch.testing.assert_close(model(**inputs, logits_to_keep=n).logits, every[:, -n:])
        first = model.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        more = torch.cat([first.sequences, torch.full((3, 2), 20)], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
        cache, lengths = first.past_key_values, first.past_key_values.kv_lengths()
        model.generate(input_ids=more, attention_mask=mask, past_key_values=cache, max_new_tokens=2, do_sample=False)
        assert cache.kv_lengths() == [n + 4 for n in lengths]


@torch.no_grad()
def test_listing_and_costs():
    model, inputs = gemma4().model, gemma4().inputs(ROWS)
    program = vr.rewrite(vr.trace(model, inputs), [Stride(0.5, at=4)])
    assert [layer.owner for layer in program.anatomy.layers] == [0, 1, 2, 1, 2, 1]
    assert str(program.plan).endswith("layers 4-5     run_on Text | stride, attend_to All")
    costs = program.costs(program.call.counts)
    assert [cost.kv_bytes > 0 for cost in costs] == [True] * 3 + [False] * 3
    assert costs[5].run < costs[5].keys == costs[1].keys


@torch.no_grad()
def test_keys_that_the_owner_has_not_cannot_be_scored():
    model, inputs = gemma4().model, gemma4().inputs(ROWS)
    why = r"layer 4 attends to layer 2's keys of Text, not of All; expected one of .* keys of its own, 0, 1, 2 \("
    with pytest.raises(ValueError, match=why):
        vr.rewrite(vr.trace(model, inputs), [VISOR([0, 1, 3, 4, 5]), FastV(at=4)], strict=True)


@torch.no_grad()
def test_what_one_plan_of_several_scores_is_no_matter_of_the_others():
    @frozen_pass
    class Both:
        name: ClassVar[str] = "both"

        def refuse(self, plan):
            return None

        def change(self, plan):
            cheap, other = plan.copy(), plan.copy()
            VTW(at=1).change(cheap)
            FastV(0.5, at=4).change(other)
            plan.dispatch(Routed(1, lambda hidden: torch.ones(len(hidden), dtype=torch.int64)), [cheap, other])

    model, inputs = gemma4().model, gemma4().inputs(ROWS[:1])
    found = []
    for passes in ([Both()], [FastV(0.5, at=4)]):
        with vr.applied(model, passes, strict=True):
            found.append(model(**inputs).logits)
    assert torch.equal(*found)


def test_a_sharing_layer_attends_to_what_its_owner_keeps():
    plan = Plan(4, owners=(0, 1, 0, 1))
    plan.layer(0).run_on(Text)
    plan.layer(2).attend_to(All)
    assert [entry.keys for entry in plan.layers] == [Text, All, Text, All]
    copied = plan.copy()
    copied.layer(1).run_on(Text)
    assert copied.layer(3).keys == Text and plan.layer(3).keys == All
    assert plan.layer(3).run_on(Text).keys == All
    assert plan.vision(3) == Text.vision_part()
