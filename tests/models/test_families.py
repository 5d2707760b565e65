"""Seven model families, whatever they do to images, positions and masks, come out as the oracle says."""

from __future__ import annotations

import copy
import functools
import itertools
from typing import Any

import pytest
import torch

import vlmrewrite as vr
from tests.small import family as shared
from vlmrewrite.oracle.hooks import oracle_logits
from vlmrewrite.oracle.masks import LayerMasks
from vlmrewrite.passes import STS, Random, Stride
from vlmrewrite.plan.budget import tokens_kept
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import FAMILIES, Row, Side, TinyVLM

# The second row is long and keeps little: where a set has one length for all rows, dropped tokens fill it up.
BATCH = [Row(1, 12, 8), Row(2, 0, 3), Row(0, 7, 2)]
ONE = [Row(2, 1, 3)]
TEXT = [Row(0, 4, 3), Row(0, 1, 1)]
DEPTH = 3
family = functools.partial(shared, layers=DEPTH)
RECIPES: dict[str, list[vr.Pass]] = {"sts": [STS(keep=5, refine=3, at=1)], "controls": [Stride(0.5), Random(2, at=2)]}
recipes = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


@pytest.fixture(params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> TinyVLM:
    return family(request.param)


# ---- the models are worth testing with


def test_same_seed_same_model(tiny: TinyVLM) -> None:
    before = torch.random.get_rng_state()
    again, other = FAMILIES[tiny.name](DEPTH, seed=0), FAMILIES[tiny.name](DEPTH, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = zip(tiny.model.parameters(), again.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)
    a, b, c = tiny.inputs(BATCH, seed=3), again.inputs(BATCH, seed=3), tiny.inputs(BATCH, seed=4)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["pixel_values"].flatten()[:9], c["pixel_values"].flatten()[:9])


@torch.no_grad()
def test_vision_and_attention_matter(tiny: TinyVLM) -> None:
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
def test_oracle_with_full_masks_is_the_model(tiny: TinyVLM) -> None:
    inputs = tiny.inputs(BATCH)
    real = inputs["attention_mask"].bool()
    expected = tiny.model(**inputs).logits[real]
    torch.testing.assert_close(oracle_logits(tiny.model, inputs, _masks(tiny, inputs))[real], expected)


def _masks(tiny: TinyVLM, inputs: dict[str, Any]) -> list[LayerMasks]:
    every = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    return [LayerMasks(every.clone(), every.clone()) for _ in tiny.model.get_decoder().layers]


def test_rows_must_hold_something() -> None:
    with pytest.raises(ValueError, match=r"expected at least one row and a token in each"):
        family("llava").inputs([Row(1), Row(0, 0, 0)])


# ---- anatomy


@pytest.mark.wide
def test_anatomy(tiny: TinyVLM) -> None:
    inputs = tiny.inputs(BATCH)
    program = vr.trace(tiny.model, inputs)
    anatomy = program.anatomy
    batch, length = inputs["input_ids"].shape
    assert [layer.index for layer in anatomy.layers] == list(range(DEPTH))
    assert all(x.heads == 4 and x.kv_heads == 2 and x.head_size == x.value_size == 8 for x in anatomy.layers)
    assert all(a.exit is b.entry for a, b in itertools.pairwise(anatomy.layers))
    assert all(layer.append is not None for layer in anatomy.layers)
    assert [(m.modality, m.node.target) for m in anatomy.merges] == [("image", "masked_scatter")]
    assert torch.equal(program.vision_mask(*program.inputs), inputs["input_ids"] == tiny.image_token_id)
    assert program.call is not None
    assert program.call.vision.shape == (batch, length)
    assert program.call.counts.images == tuple(n for row in _images(tiny, inputs) for n in row)


LISTINGS = {
    "llava": """\
program: 3 decoder layers, hidden 32, float32; 3 rows of 36 tokens, 3 images, 48 vision tokens, padded
repulsion = Vision.select(repulsion, keep=5) at layer 0
relevance = repulsion.select(relevance, keep=3) at layer 1
layers  run on            attend to         tokens  keys  q    k, v  GFLOP     K/V
0       Text | repulsion  Text | repulsion  25      25    4x8  2x8   0.001622  9.375 KiB
1       Text | relevance  Text | relevance  23      23    4x8  2x8   0.001563  8.625 KiB
2       Text | relevance  Text | relevance  23      23    4x8  2x8   0.001475  8.625 KiB
total: 0.00466 GFLOP, K/V 26.62 KiB""",
    "gemma3": """\
program: 3 decoder layers, hidden 32, float32; 3 rows of 31 tokens, 3 images, 27 vision tokens, padded
repulsion = Vision.select(repulsion, keep=5) at layer 0
relevance = repulsion.select(relevance, keep=3) at layer 1
layers  run on            attend to         tokens  keys  q    k, v  GFLOP     K/V
0       Text | repulsion  Text | repulsion  27      27    4x8  2x8   0.001773  10.12 KiB
1       Text | relevance  Text | relevance  25      25    4x8  2x8   0.001717  9.375 KiB
2       Text | relevance  Text | relevance  25      25    4x8  2x8   0.001622  9.375 KiB
total: 0.005112 GFLOP, K/V 28.88 KiB""",
}


@pytest.mark.parametrize("tiny", LISTINGS, indirect=True)
def test_listing(tiny: TinyVLM) -> None:
    program = vr.rewrite(vr.trace(tiny.model, tiny.inputs(BATCH)), RECIPES["sts"])
    assert str(program) == LISTINGS[tiny.name]


# ---- numbers


@recipes
@pytest.mark.parametrize("side", ["left", "right"])
def test_forward_agrees_with_the_oracle(tiny: TinyVLM, recipe: list[Any], side: Side) -> None:
    forward_agreement(tiny.model, tiny.inputs(BATCH, side=side, seed=2), recipe).check()


@pytest.mark.slow
@pytest.mark.wide
@recipes
def test_generation_agrees_with_the_oracle(tiny: TinyVLM, recipe: list[Any]) -> None:
    inputs = tiny.inputs(BATCH, seed=3)
    agreement = generation_agreement(tiny.model, inputs, recipe, new_tokens=5)
    agreement.check()
    assert agreement.kv_lengths == [n + 4 for n in _lengths(tiny, inputs, recipe)]


def _lengths(tiny: TinyVLM, inputs: dict[str, Any], recipe: list[Any]) -> list[int]:
    """Tokens that each layer keeps of the longest row."""
    first, *rest = recipe
    later = [(p.at, p.keep) for p in rest] or [(first.at, first.refine)]
    text = (inputs["attention_mask"].bool() & (inputs["input_ids"] != tiny.image_token_id)).sum(1).tolist()
    out = []
    for layer in range(DEPTH):
        budgets = [first.keep, *(keep for at, keep in later if at <= layer)]
        kept = [sum(min(tokens_kept(b, n) for b in budgets) for n in row) for row in _images(tiny, inputs)]
        out.append(max(map(sum, zip(text, kept, strict=True))))
    return out


def _images(tiny: TinyVLM, inputs: dict[str, Any]) -> list[list[int]]:
    """Vision tokens of each image of each row; InternVL's tiles, which touch, count as images."""
    out: list[list[int]] = []
    for row in (inputs["input_ids"] == tiny.image_token_id).tolist():
        runs = [len(list(run)) for vision, run in itertools.groupby(row) if vision]
        out.append([4] * (sum(runs) // 4) if tiny.name == "internvl" else runs)
    return out


def test_keeping_everything_generates_the_same(tiny: TinyVLM) -> None:
    _generates_the_same(tiny, BATCH)


@pytest.mark.parametrize("tiny", ["qwen2_5_vl", "gemma3"], indirect=True)
def test_keeping_everything_generates_the_same_for_one_row(tiny: TinyVLM) -> None:
    _generates_the_same(tiny, ONE)


def _generates_the_same(tiny: TinyVLM, rows: list[Row]) -> None:
    inputs = tiny.inputs(rows, seed=3)
    greedy = {"do_sample": False, "repetition_penalty": 2.0, "max_new_tokens": 6, "return_dict_in_generate": True}
    expected = tiny.model.generate(**inputs, **greedy)
    with vr.applied(tiny.model, [Stride(keep=10**6)]):
        out = tiny.model.generate(**inputs, **greedy)
    assert torch.equal(out.sequences, expected.sequences)
    assert len(out.sequences[:, -6:].unique()) > 3
    assert out.past_key_values.kv_lengths() == [inputs["input_ids"].shape[1] + 5] * DEPTH


@torch.no_grad()
def test_without_an_image_nothing_changes(tiny: TinyVLM) -> None:
    inputs = tiny.inputs(TEXT)
    assert not any("pixel" in name for name in inputs)
    expected = tiny.model(**inputs).logits
    generated = tiny.model.generate(**inputs, do_sample=False, max_new_tokens=4)
    with vr.applied(tiny.model, RECIPES["sts"]):
        torch.testing.assert_close(tiny.model(**inputs).logits, expected)
        assert torch.equal(tiny.model.generate(**inputs, do_sample=False, max_new_tokens=4), generated)


def test_gemma3_has_two_kinds_of_mask() -> None:
    tiny = family("gemma3")
    text, (images,) = tiny.model.config.text_config, _images(tiny, tiny.inputs(ONE))
    assert text.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    assert text.sliding_window < images[0] < tiny.inputs(ONE)["input_ids"].shape[1]


def test_images_of_a_family_differ_in_size() -> None:
    for name in ("llava_next", "qwen2_5_vl", "internvl", "smolvlm"):
        tiny = family(name)
        totals = {sum(_images(tiny, tiny.inputs([Row(1)], seed=seed))[0]) for seed in range(8)}
        assert len(totals) > 1, name
