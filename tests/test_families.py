"""Seven model families, whatever they do to images, positions and masks, come out as the oracle says."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

import vlmrewrite as vr
from vlmrewrite.budget import tokens_kept
from vlmrewrite.passes import STS, Random, Stride
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import FAMILIES, Row, TinyVLM
from vlmrewrite.testing.oracle import LayerMasks, oracle_logits

BATCH = [Row(1, 2, 3), Row(2, 0, 4), Row(0, 7, 2)]
ONE = [Row(2, 1, 3)]
TEXT = [Row(0, 4, 3), Row(0, 1, 1)]
RECIPES = {
    "sts": [STS(keep=5, refine=3, at=2)],
    "controls": [Stride(0.5), Random(2, at=1)],
}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> TinyVLM:
    return FAMILIES[request.param]()


# ---- the models are worth testing with


def test_same_seed_same_model(tiny):
    before = torch.random.get_rng_state()
    again, other = FAMILIES[tiny.name](seed=0), FAMILIES[tiny.name](seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = zip(tiny.model.parameters(), again.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)
    a, b, c = tiny.inputs(BATCH, seed=3), again.inputs(BATCH, seed=3), tiny.inputs(BATCH, seed=4)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["pixel_values"].flatten()[:9], c["pixel_values"].flatten()[:9])


@torch.no_grad()
def test_vision_and_attention_matter(tiny):
    inputs = tiny.inputs(BATCH, side="left")
    eager = copy.deepcopy(tiny.model)
    eager.set_attn_implementation("eager")
    out = eager(**inputs, output_attentions=True)
    assert 0.5 < float(out.logits.std()) < 5
    for weights in out.attentions:  # of the last token; 1 would be uniform
        used = weights[:, :, -1]
        entropy = -(used * used.clamp(min=1e-9).log()).sum(-1) / (used > 0).sum(-1).log()
        assert 0.2 < float(entropy.mean()) < 0.95
    nothing = _masks(tiny, inputs)
    for m in nothing:
        m.keys[inputs["input_ids"] == tiny.image_token_id] = False
    change = (oracle_logits(tiny.model, inputs, nothing) - out.logits)[:, -1].abs().amax(-1)
    assert float(change[:2].min()) > 0.1
    assert float(change[2]) < 1e-4


@torch.no_grad()
def test_oracle_with_full_masks_is_the_model(tiny):
    inputs = tiny.inputs(BATCH)
    real = inputs["attention_mask"].bool()
    expected = tiny.model(**inputs).logits[real]
    torch.testing.assert_close(oracle_logits(tiny.model, inputs, _masks(tiny, inputs))[real], expected)


def _masks(tiny: TinyVLM, inputs: dict[str, torch.Tensor]) -> list[LayerMasks]:
    every = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    return [LayerMasks(every.clone(), every.clone()) for _ in tiny.model.get_decoder().layers]


def test_rows_must_hold_something(tiny):
    with pytest.raises(ValueError, match=r"expected at least one row and a token in each"):
        tiny.inputs([Row(1), Row(0, 0, 0)])


# ---- anatomy


def test_anatomy(tiny):
    inputs = tiny.inputs(BATCH)
    program = vr.trace(tiny.model, inputs)
    anatomy = program.anatomy
    batch, length = inputs["input_ids"].shape
    assert [layer.index for layer in anatomy.layers] == [0, 1, 2, 3]
    assert {(layer.heads, layer.kv_heads, layer.head_size, layer.value_size) for layer in anatomy.layers} == {
        (4, 2, 8, 8)
    }
    assert all(a.exit is b.entry for a, b in itertools.pairwise(anatomy.layers))
    assert all(layer.append is not None for layer in anatomy.layers)
    assert anatomy.merge.target == "masked_scatter"
    assert torch.equal(program.vision_mask()(*program.inputs), inputs["input_ids"] == tiny.image_token_id)
    assert program.call is not None
    assert program.call.vision.shape == (batch, length)
    assert program.call.census.images == tuple(n for row in _images(tiny, inputs) for n in row)


LISTINGS = {
    "llava": """""",
    "gemma3": """""",
}


@pytest.mark.parametrize("name", LISTINGS)
def test_listing(name):
    tiny = FAMILIES[name]()
    program = vr.rewrite(vr.trace(tiny.model, tiny.inputs(BATCH)), RECIPES["sts"])
    assert str(program) == LISTINGS[name]


# ---- numbers


@recipes
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_agrees_with_the_oracle(tiny, recipe, side):
    forward_agreement(tiny.model, tiny.inputs(BATCH, side=side, seed=1), recipe).check()


@recipes
def test_generation_agrees_with_the_oracle(tiny, recipe):
    inputs = tiny.inputs(BATCH, seed=2)
    agreement = generation_agreement(tiny.model, inputs, recipe, new_tokens=5)
    agreement.check()
    assert agreement.kv_lengths == [n + 4 for n in _lengths(tiny, inputs, recipe)]


def _lengths(tiny: TinyVLM, inputs: dict[str, torch.Tensor], recipe: list) -> list[int]:
    """Tokens that each of 4 layers keeps of the longest row."""
    if isinstance(recipe[0], STS):
        (sts,) = recipe
        stages = [(0, [sts.keep]), (sts.at, [sts.keep, sts.refine])]
    else:
        stages = [(p.at, [q.keep for q in recipe[: i + 1]]) for i, p in enumerate(recipe)]
    text = (inputs["attention_mask"].bool() & (inputs["input_ids"] != tiny.image_token_id)).sum(1).tolist()
    out = []
    for layer in range(4):
        budgets = [b for at, b in stages if at <= layer][-1]
        kept = [sum(min(tokens_kept(b, n) for b in budgets) for n in row) for row in _images(tiny, inputs)]
        out.append(max(map(sum, zip(text, kept, strict=True))))
    return out


def _images(tiny: TinyVLM, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    """Vision tokens of each image of each row; InternVL's tiles, which touch, count as images."""
    out: list[list[int]] = []
    for row in (inputs["input_ids"] == tiny.image_token_id).tolist():
        runs = [len(list(run)) for vision, run in itertools.groupby(row) if vision]
        out.append([4] * (sum(runs) // 4) if tiny.name == "internvl" else runs)
    return out


@pytest.mark.parametrize("rows", [BATCH, ONE], ids=["batch", "one row"])
def test_keeping_everything_generates_the_same(tiny, rows):
    inputs = tiny.inputs(rows, seed=3)
    greedy = {"do_sample": False, "max_new_tokens": 6, "return_dict_in_generate": True}
    expected = tiny.model.generate(**inputs, **greedy)
    with vr.applied(tiny.model, [Stride(keep=10**6)]):
        out = tiny.model.generate(**inputs, **greedy)
    assert torch.equal(out.sequences, expected.sequences)
    assert len(out.sequences[:, -6:].unique()) > 2
    held = int(inputs["attention_mask"].sum(1).max())
    assert held == inputs["input_ids"].shape[1]
    assert out.past_key_values.kv_lengths() == [held + 5] * 4


@torch.no_grad()
def test_without_an_image_nothing_changes(tiny):
    inputs = tiny.inputs(TEXT)
    assert not any("pixel" in name for name in inputs)
    expected = tiny.model(**inputs).logits
    generated = tiny.model.generate(**inputs, do_sample=False, max_new_tokens=4)
    with vr.applied(tiny.model, RECIPES["sts"]):
        torch.testing.assert_close(tiny.model(**inputs).logits, expected)
        assert torch.equal(tiny.model.generate(**inputs, do_sample=False, max_new_tokens=4), generated)


def test_gemma3_sees_images_whole_and_text_through_a_window():
    """What makes this family hard: the mask is neither causal nor the same in all layers."""
    tiny = FAMILIES["gemma3"]()
    text = tiny.model.config.text_config
    assert text.layer_types == ["sliding_attention", "full_attention"] * 2
    assert text.sliding_window < tiny.inputs(ONE)["input_ids"].shape[1]
    assert text.sliding_window < max(_images(tiny, tiny.inputs(ONE))[0])
