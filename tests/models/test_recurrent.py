"""Decoders with recurrent and convolutional layers: they run on the tokens of their set, one behind the other."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import DynamicCache, FalconH1Config, GraniteMoeHybridConfig, Lfm2Config, OlmoHybridConfig

import vlmrewrite as vr
from tests.small import crossed, long
from vlmrewrite.capture import captures_of
from vlmrewrite.ops import RECURRENT
from vlmrewrite.oracle import LayerMasks, layer_masks, oracle_logits
from vlmrewrite.passes import DPVR, STS, VISOR, FastV, ShortV, Stride
from vlmrewrite.testing.agreement import extended, forward_agreement, generation_agreement
from vlmrewrite.testing.models import Row
from vlmrewrite.testing.models.families import llava_of
from vlmrewrite.testing.models.tiny import decoder_sizes

BATCH = [Row(2, 2, 3), Row(1, 4, 3), Row(0, 9, 1)]

GREEDY = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}

RECIPES = {
    "stride": [Stride(0.5)],
    "sts": [STS(keep=5, refine=3, at=1)],
    "fastv": [FastV(keep=0.5, at=1)],
    "dpvr through a recurrent layer": [DPVR(at=0)],
    "dpvr through attention": [DPVR(at=1)],
    "visor": [VISOR(self_layers=(0, 2), cross_layers=(1, 3))],
    "less and less": [Stride(3, at=1), Stride(2, at=2)],
}


def kinds(other):
    return [other, "full_attention"] * 2


def delta(**more):
    """Sizes of layers with the gated delta rule."""
    heads = {"linear_num_value_heads": 4, "linear_num_key_heads": 4}
    return heads | {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 4} | more


STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}

TEXTS = {
    "convolutions with a bias": lambda: Lfm2Config(
        **decoder_sizes(4, layer_types=kinds("conv"), conv_bias=True, block_auto_adjust_ff_dim=False)
    ),
    "delta rule": lambda: OlmoHybridConfig(**decoder_sizes(4, layer_types=kinds("linear_attention"), **delta())),
    "state space": lambda: GraniteMoeHybridConfig(
        **decoder_sizes(4, layer_types=["mamba", "attention"] * 2, num_local_experts=0, **STATE_SPACE),
        shared_intermediate_size=64,
    ),
}


@functools.cache
def tiny(name):
    return llava_of(name, TEXTS[name](), 0)


@pytest.fixture(
    params=["convolutions with a bias", *(pytest.param(x, marks=pytest.mark.slow) for x in list(TEXTS)[1:])]
)
def each(request):
    return tiny(request.param)


@pytest.fixture
def conv():
    return tiny("convolutions with a bias")


@pytest.mark.wide
@pytest.mark.parametrize(("name", "recipe"), crossed(TEXTS, RECIPES))
def test_generation_agrees_with_the_oracle(name, recipe):
    found = generation_agreement(tiny(name).model, tiny(name).inputs(BATCH, side="left"), RECIPES[recipe])
    found.check()
    assert found.kv_lengths[::2] == [0, 0]


@pytest.mark.wide
@pytest.mark.parametrize(("name", "recipe"), crossed(TEXTS, reversed(RECIPES)))
def test_a_forward_padded_on_the_right_agrees_with_the_oracle(name, recipe):
    forward_agreement(tiny(name).model, tiny(name).inputs(BATCH, side="right", seed=1), RECIPES[recipe]).check()


@torch.no_grad()
def test_the_oracle_is_the_model_on_the_tokens_that_are_left(each):
    inputs, lm = each.inputs([Row(2, 2, 3)]), each.model
    vision = inputs["input_ids"] == each.image_token_id
    left = ~vision | (vision.cumsum(1) % 3 == 1)
    got = oracle_logits(lm, inputs, [LayerMasks(left, left)] * 4)[left]
    embeds = lm.get_input_embeddings()(inputs["input_ids"])
    features = torch.cat(tuple(lm.base_model.get_image_features(inputs["pixel_values"]).pooler_output))
    embeds[vision] = features.flatten(0, -2)
    there = torch.ones(1, int(left.sum()), dtype=torch.int64)  # or a jump of positions would be taken for packing
    at = torch.arange(embeds.shape[1])[None][left][None]
    shorter = lm(inputs_embeds=embeds[left][None], attention_mask=there, position_ids=at, use_cache=False).logits[0]
    torch.testing.assert_close(got, shorter, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", TEXTS if long() else [*TEXTS][:1])
def test_a_row_is_as_it_is_alone(name):
    """Also where convolutions have a bias, so that the unmodified model's padding reaches its tokens."""
    each, images = tiny(name), torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    more, less = each.inputs([Row(2, 2, 3)]), each.inputs([Row(1, 3, 1)], seed=7)
    pad = more["input_ids"].shape[1] - less["input_ids"].shape[1]
    padded = {k: torch.nn.functional.pad(less[k], (pad, 0)) for k in ("input_ids", "attention_mask")}
    both = {k: torch.cat([more[k], padded[k]]) for k in padded} | {"pixel_values": images}
    with vr.applied(each.model, [Stride(3)]):
        got = each.model.generate(**both, **GREEDY, return_dict_in_generate=True, output_logits=True)
        for row, (x, own) in enumerate([(more, images[:2]), (less, images[2:])]):
            alone = each.model.generate(
                **x | {"pixel_values": own}, **GREEDY, return_dict_in_generate=True, output_logits=True
            )
            torch.testing.assert_close(
                torch.stack(got.logits)[:, row], torch.stack(alone.logits)[:, 0], atol=2e-3, rtol=1e-3
            )


@torch.no_grad()
def test_keeping_everything_is_the_original(each):
    inputs = each.inputs(BATCH, side="left")
    logits, tokens = each.model(**inputs).logits, each.model.generate(**inputs, **GREEDY)
    beams = each.model.generate(**inputs, **GREEDY, num_beams=3)
    with vr.applied(each.model, [Stride(1.0)]):
        assert torch.equal(each.model(**inputs).logits, logits)
        assert torch.equal(each.model.generate(**inputs, **GREEDY), tokens)
        assert torch.equal(each.model.generate(**inputs, **GREEDY, use_cache=False), tokens)
        assert torch.equal(each.model.generate(**inputs, **GREEDY, num_beams=3), beams)


def test_beams_carry_their_states_with_them(conv):
    """A beam's score is the oracle's for its tokens, which it is not where a state is another beam's."""
    inputs = conv.inputs([Row(2, 2, 3)], seed=3)
    how = {"num_beams": 4, "max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}
    with vr.applied(conv.model, [Stride(3)]):
        out = conv.model.generate(**inputs, do_sample=False, **how)
        masks = layer_masks(conv.model, inputs["input_ids"].shape[1] + 5)
    first = [LayerMasks(m.run[:1], m.keys[:1]) for m in masks]
    logits = oracle_logits(conv.model, extended(conv.model, inputs, out.sequences[:, -6:-1]), first)
    score = logits[0, -6:].log_softmax(-1).gather(1, out.sequences[0, -6:, None]).sum() / 6
    assert float(out.sequences_scores[0]) == pytest.approx(float(score), abs=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_second_turn_with_an_image_goes_on_with_the_states(conv):
    model, first, second = conv.model, conv.inputs([Row(1, 2, 3)], seed=4), conv.inputs([Row(1, 1, 2)], seed=5)
    with vr.applied(model, [Stride(3)]):
        cache = DynamicCache(config=model.config)
        model(**first, past_key_values=cache)
        told = layer_masks(model)
        n = first["input_ids"].shape[1]
        mask = torch.ones(1, n + second["input_ids"].shape[1], dtype=torch.int64)
        got = model(**second | {"attention_mask": mask}, past_key_values=cache).logits
        masks = [
            LayerMasks(torch.cat([a.run, b.run], 1), torch.cat([a.keys, b.keys], 1))
            for a, b in zip(told, layer_masks(model), strict=True)
        ]
    whole = {k: torch.cat([first[k], second[k]], int(k != "pixel_values")) for k in first}
    torch.testing.assert_close(got, oracle_logits(model, whole, masks)[:, n:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_rows_of_states_can_be_picked_and_repeated(conv):
    inputs = conv.inputs(BATCH, side="left")
    mask, token = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1), torch.full((3, 1), 9)
    with vr.applied(conv.model, [Stride(3)]):
        cache = conv.model(**inputs).past_key_values
        expected = conv.model(token, attention_mask=mask, past_key_values=copy.deepcopy(cache)).logits
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 2]))
        got = conv.model(token, attention_mask=mask[[2, 0, 1]], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[[2, 0, 1]], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_states_do_not_go_back(conv):
    inputs = conv.inputs([Row(1)])
    with vr.applied(conv.model, [Stride(3)]):
        cache = conv.model(**inputs).past_key_values
        before = cache.kv_lengths(), cache.get_seq_length()
        with pytest.raises(NotImplementedError, match=r"state cannot go back .* crop\(-2\) was called: start with an"):
            cache.crop(-2)
        cache.crop(0)
        assert (cache.kv_lengths(), cache.get_seq_length()) == before
        assert not cache.is_croppable
        with pytest.raises(NotImplementedError, match="generate without an assistant"):
            conv.model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2)


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (FastV(keep=0.5, at=2), "layer 2 is recurrent and pays no attention to choose by; .* with attention, 1, 3"),
        (ShortV(layers=(2,)), "layer 2 is recurrent and cannot attend to All and run on Text; .* attention, 1, 3"),
        (VISOR(cross_layers=(0,)), "layer 0 is recurrent and cannot attend to All and run on Text"),
    ],
)
@torch.no_grad()
def test_what_has_no_meaning_in_a_recurrent_layer_is_refused(conv, refused, reason):
    inputs = conv.inputs([Row(1)])
    traced = vr.trace(conv.model, inputs)
    with pytest.raises(ValueError, match=reason):
        vr.rewrite(traced, [refused], strict=True)
    with vr.applied(conv.model, [refused, Stride(3)]):
        conv.model(**inputs)
        report = vr.report(conv.model)
    assert report.passes[0]["reason"] is not None
    assert [x["run_on"] for x in report.layers] == ["Text | stride"] * 4
    assert "recurrent" in "".join(report.notes)


def test_gradients_are_the_originals(conv):
    inputs = conv.inputs(BATCH, side="left")
    model = copy.deepcopy(conv.model)

    def gradients():
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with vr.applied(model, [Stride(1.0)]):
        got = gradients()
    assert got.keys() == expected.keys()
    for name, x in got.items():
        torch.testing.assert_close(x, expected[name], atol=1e-5, rtol=1e-4)


def test_a_branch_through_a_recurrent_layer_learns(conv):
    inputs = conv.inputs(BATCH, side="left")
    model = copy.deepcopy(conv.model)
    with vr.applied(model, [DPVR(at=0)]):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        learned = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert any("conv.conv.weight" in name for name in learned)
        assert all(g is not None and g.abs().sum() > 0 for g in learned.values())


@torch.no_grad()
def test_one_graph_serves_all_lengths(conv):
    model = copy.deepcopy(conv.model)
    with vr.applied(model, [Stride(3)]):
        for before in (2, 30, 130):
            model(**conv.inputs([Row(1, before), Row(2, 1)]))
        assert len(captures_of(model).call.graphs) == 1


@torch.no_grad()
def test_a_model_is_left_as_it_was(conv):
    modules = dict(conv.model.named_modules())
    before = {name: vars(m).get("forward") for name, m in modules.items()}
    assert vr.verify(conv.model, conv.inputs(BATCH), [Stride(3)]) < 1e-4
    vr.trace(conv.model, conv.inputs([Row(1)]))
    assert {name: vars(m).get("forward") for name, m in modules.items()} == before


def test_the_operators_contract(conv):
    with torch.no_grad():
        graph = vr.trace(conv.model, conv.inputs([Row(1)])).captured.graph
    node = next(n for n in graph.nodes if n.target is RECURRENT)
    mixer = conv.model.base_model.language_model.layers[0].conv
    weights = [p.detach().clone().requires_grad_() for p in mixer.parameters()]
    hidden = torch.randn(2, 5, 32, requires_grad=True)
    there = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 0, 0, 1]]).bool()
    for states in ([], [torch.randn(2, 32, 3)]):
        torch.library.opcheck(RECURRENT, (hidden, there, states, weights, node.args[4], False))


def test_keys_and_a_state_in_one_layer_are_refused():
    sizes = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8, "mamba_n_groups": 1}
    tiny = llava_of("falcon", FalconH1Config(**decoder_sizes(2, **sizes)), 0)
    with pytest.raises(ValueError, match=r"decoder layer 0 of Llava.* keeps keys and a recurrent state side by side"):
        vr.apply(tiny.model, [Stride(3)])


@pytest.mark.slow
def test_autocast_is_refused(conv):
    with (
        vr.applied(conv.model, [Stride(3)]),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match=r"cannot be captured under torch\.autocast: leave it"),
    ):
        conv.model(**conv.inputs([Row(1)]))
