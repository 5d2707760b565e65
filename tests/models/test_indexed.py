"""Decoders whose layers attend to the keys that an index selects: any set of tokens, each row's without padding."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV32Config

import vlmrewrite as vr
from tests.small import crossed
from vlmrewrite.ops import INDEX_KEYS, INDEXED
from vlmrewrite.passes import DPVR, STS, VISOR, FastV, ShortV, Stride
from vlmrewrite.plan import Pass, Text, frozen_pass
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import ZOO, Row
from vlmrewrite.testing.models.families import llava_of
from vlmrewrite.testing.models.tiny import decoder_sizes

BATCH = [Row(2, 2, 3), Row(1, 4, 3), Row(0, 9, 1)]

RECIPES = {
    "stride": [Stride(0.5)],
    "stride at each": [Stride(3, at=1), Stride(2, at=2)],
    "dpvr": [DPVR(at=1)],
    "shortv": [ShortV(layers=(1, 2))],
    "visor": [VISOR(self_layers=(0,), cross_layers=(1, 3))],
}

RANKS = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}

INDEX = {"index_n_heads": 16, "index_head_dim": 8, "index_topk": 4}

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32}


@functools.cache
def tiny(name):
    if name != "low ranks":
        return ZOO[name](4, 0)
    config = DeepseekV32Config(**decoder_sizes(4, **RANKS, **INDEX, **EXPERTS, num_key_value_heads=4, head_dim=4))
    return llava_of("low ranks", config, 0)


NAMES = ["minimax_m3_vl", "dots3_note", "low ranks"]


@pytest.mark.parametrize(("name", "recipe"), crossed(NAMES, RECIPES))
@pytest.mark.slow
def test_agrees_with_the_oracle(name, recipe):
    for side in ("left", "right"):
        forward_agreement(tiny(name).model, tiny(name).inputs(BATCH, side=side), RECIPES[recipe]).check()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_generates_as_the_oracle_says(name):
    for recipe in ([Stride(3)], [VISOR(self_layers=(0,), cross_layers=(1, 3))]):
        generation_agreement(tiny(name).model, tiny(name).inputs(BATCH, side="left"), recipe, new_tokens=5).check()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
@torch.no_grad()
def test_without_a_recipe_s_work_it_is_the_unmodified_model(name):
    model, inputs = tiny(name).model, tiny(name).inputs([Row(2, 3, 4)])
    expected = model(**inputs).logits
    told = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    tokens = model.generate(**inputs, **told)
    with vr.applied(model, [Stride(1.0)]):
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)
        assert model.generate(**inputs, **told).tolist() == tokens.tolist()
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)


@pytest.mark.slow
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others():
    model, rows = tiny("minimax_m3_vl").model, tiny("minimax_m3_vl").inputs(BATCH, side="left")
    start = int(rows["attention_mask"][1].argmax())
    with vr.applied(model, [Stride(2)]):
        together = model(**rows).logits[1, start:]
        first, n = rows["image_grid_thw"][:2].prod(1).sum(), rows["image_grid_thw"][2].prod()
        alone = model(
            input_ids=rows["input_ids"][1:2, start:],
            attention_mask=rows["attention_mask"][1:2, start:],
            pixel_values=rows["pixel_values"][first : first + n],
            image_grid_thw=rows["image_grid_thw"][2:3],
        ).logits[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_cache_is_cropped_and_reordered():
    one = tiny("low ranks")
    model, inputs = one.model, one.inputs([Row(1, 3, 4), Row(1, 2, 5)], side="left")
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.int64)], 1)
    with vr.applied(model, [Stride(3)]):
        cache = model(**inputs).past_key_values
        other = copy.deepcopy(cache)
        expected = model(input_ids=ids, past_key_values=cache, attention_mask=mask).logits
        cache.crop(-2)
        again = model(input_ids=ids[:, 1:], past_key_values=cache, attention_mask=mask).logits
        torch.testing.assert_close(again, expected[:, 1:], rtol=1e-4, atol=1e-4)
        other.reorder_cache(torch.tensor([1, 0]))
        swapped = model(input_ids=ids.flip(0), past_key_values=other, attention_mask=mask.flip(0)).logits
        torch.testing.assert_close(swapped, expected.flip(0), rtol=1e-4, atol=1e-4)
        beams = model.generate(**inputs, num_beams=2, do_sample=False, max_new_tokens=4)
        assert beams.shape[0] == 2


@pytest.mark.parametrize("made", [STS(keep=5, refine=3, at=2), FastV(keep=0.5, at=2)])
def test_what_goes_by_attention_there_is_refused(made):
    one = tiny("minimax_m3_vl")
    with pytest.raises(ValueError, match=r"layer 2 is indexed and pays no attention that is known; .* attention, 0"):
        vr.verify(one.model, one.inputs([Row(1)]), [made])


@torch.no_grad()
def test_what_it_costs_is_what_runs():
    """FLOPs of the report are those of the operators, as PyTorch counts them inside."""
    one = tiny("low ranks")
    inputs = one.inputs([Row(1, 3, 4)])
    program = vr.trace(one.model, inputs)
    layer = program.anatomy.layers[1]
    assert layer.kind == "indexed"
    n = inputs["input_ids"].shape[1]
    mixer = one.model.base_model.language_model.layers[1].self_attn
    with FlopCounterMode(display=False) as counter:
        mixer(
            hidden_states=torch.randn(1, n, 32),
            position_embeddings=(torch.randn(1, n, 4), torch.randn(1, n, 4)),
            attention_mask=torch.ones(1, 1, n, n, dtype=torch.bool).tril(),
        )
    asked, expanding = layer.behind[layer.attention], 2 * mixer.kv_b_proj.weight.numel()
    made = next(flops for node, flops in layer.keys.items() if node.target is INDEX_KEYS)
    assert counter.get_total_flops() == n * (asked + expanding) + layer.attention_flops(n, n)
    needed = sum(2 * m.weight.numel() for m in (mixer.kv_a_proj_with_mqa, mixer.kv_b_proj, mixer.indexer.wk))
    assert made >= needed


@pytest.mark.slow
@torch.no_grad()
def test_positions_wider_than_the_stream():
    """dots3-note makes them in fp32 for its index, whatever the model's dtype is; the index's keys are fp32 then."""
    model, inputs = copy.deepcopy(tiny("dots3_note").model).bfloat16(), tiny("dots3_note").inputs([Row(1, 3, 4)])
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    expected = model(**inputs).logits
    with vr.applied(model, [Stride(4, at=3)]):
        found = model(**inputs).logits
        assert found.dtype == torch.bfloat16
        before = inputs["input_ids"][0].tolist().index(model.config.image_token_id)
        torch.testing.assert_close(found[:, :before], expected[:, :before], rtol=0, atol=0.1)


@pytest.mark.slow
def test_a_layer_that_is_computed_again():
    one = tiny("low ranks")
    inputs, losses = one.inputs([Row(1, 3, 4)]), []
    for checkpointing in (False, True):
        model = copy.deepcopy(one.model).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        with vr.applied(model, [Stride(3)]):
            model(**inputs, labels=inputs["input_ids"], num_items_in_batch=torch.tensor(7)).loss.backward()
        losses.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0].keys() == losses[1].keys()
    for name, x in losses[0].items():
        torch.testing.assert_close(x, losses[1][name], rtol=1e-4, atol=1e-5)


def test_dropout_in_training_is_refused():
    model = copy.deepcopy(tiny("low ranks").model).train()
    for layer in model.base_model.language_model.layers:
        layer.self_attn.attention_dropout = 0.5
    with vr.applied(model, [Stride(3)]), pytest.raises(RuntimeError, match=r"has a dropout of 0\.5 in training mode"):
        model(**tiny("low ranks").inputs([Row(1)]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_tokens_that_are_no_keys(name):
    @frozen_pass
    class Deaf(Pass):
        name = "deaf"

        def change(self, plan):
            plan.layers[1].attend_to(Text)
            plan.layers[3].attend_to(Text)

    for side in ("left", "right"):
        forward_agreement(tiny(name).model, tiny(name).inputs(BATCH, side=side), [Deaf()]).check()


@torch.no_grad()
def test_an_assistant_among_windows():
    one = tiny("dots3_note")
    inputs = one.inputs([Row(1, 3, 4)])
    with vr.applied(one.model, [Stride(0.5)]):
        told = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
        greedy = one.model.generate(**inputs, **told)
        assert one.model.generate(**inputs, **told, prompt_lookup_num_tokens=2).tolist() == greedy.tolist()


@pytest.mark.slow
def test_learns_through_them():
    one = tiny("low ranks")
    model, inputs = copy.deepcopy(one.model), one.inputs([Row(2, 2, 3), Row(1, 4, 3)], side="left")
    labels = inputs["input_ids"].where(inputs["attention_mask"].bool(), -100)
    with vr.applied(model, [DPVR(at=1)]):
        model(**inputs, labels=labels).loss.backward()
        learned = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert any("kv_a_proj" in name for name in learned)
        assert all(g is not None and g.abs().sum() > 0 for name, g in learned.items() if "indexer" not in name)


@pytest.mark.slow
def test_gradients_are_the_originals():
    one = tiny("low ranks")
    inputs = one.inputs([Row(1, 3, 4)])

    def gradients(model):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, model = gradients(copy.deepcopy(one.model)), copy.deepcopy(one.model)
    with vr.applied(model, [Stride(1.0)]):
        found = gradients(model)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_the_operators_contract():
    one = tiny("low ranks")
    graph = vr.trace(one.model, one.inputs([Row(1)])).captured.graph
    node = next(n for n in graph.nodes if n.target is INDEXED)
    *_, given, widths, _, mixer = node.args
    module = one.model.base_model.language_model.layers[0].self_attn
    weights = [p.detach().clone() for p in module.parameters()]
    q, there = torch.randn(2, 1, 5, sum(widths)), torch.tensor([[1, 1, 0, 1, 1], [0, 1, 0, 0, 1]]).bool()
    torch.library.opcheck(INDEX_KEYS, (q, given, widths, weights, mixer))
    k, v = INDEX_KEYS(q, given, widths, weights, mixer)
    more = None, None, None, False, None, 0.0, given, list(widths), weights, mixer
    torch.library.opcheck(INDEXED, (q, k, v, there, *more))


@pytest.mark.parametrize(
    ("name", "takes"), [("mistral_large4", "shared_kv_states"), ("glm5_next", "prev_topk_indices")]
)
def test_an_index_that_goes_by_other_layers_is_refused(name, takes):
    with pytest.raises(ValueError, match=rf"selects keys by an index, and takes .*{takes}.*expected one that takes no"):
        vr.apply(ZOO[name](2, 0).model, [Stride(3)])


def test_a_module_that_takes_more_from_other_tokens_is_refused():
    """What one token makes of its own is not all that goes into another's output: they cannot be run apart."""
    one = tiny("low ranks")
    model = copy.deepcopy(one.model)
    for layer in model.base_model.language_model.layers:
        kind = type(layer.self_attn)

        class Whispering(kind):
            def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **kwargs):
                out, *rest = super().forward(
                    hidden_states, position_embeddings, attention_mask, past_key_values=past_key_values, **kwargs
                )
                return out + hidden_states.sum(1, keepdim=True), *rest

        layer.self_attn.__class__ = Whispering
    with pytest.raises(NotImplementedError, match=r"Whispering takes more from other tokens than the keys, values and"):
        vr.verify(model, one.inputs([Row(1)]), [Stride(3)])
