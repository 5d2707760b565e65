"""DAPE: covers of an image by regions, and detail at three depths."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmrewrite as vr
from tests.small import planned as of_passes
from tests.small import real, token_of
from tests.small import with_grid as family
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, VTW, DivPrune, FastV, Stride
from vlmrewrite.passes.dape import regions
from vlmrewrite.passes.dape.blocks import Detail, Matching
from vlmrewrite.passes.dape.matching import gains
from vlmrewrite.plan.plan import Plan
from vlmrewrite.plan.tokens import Text, Vision
from vlmrewrite.plan.vocabulary import Policy
from vlmrewrite.testing import strategies
from vlmrewrite.testing.models import Row

FEW = settings(max_examples=max(4, settings.default.max_examples // 3))
HALF = settings(max_examples=max(4, settings.default.max_examples // 2))
BATCH = [Row(2, 1, 3), Row(0, 4, 2), Row(1, 3, 4), Row(3, 2, 1)]
GRIDS = frozenset({"features", "grid"})
planned = functools.partial(of_passes, features=GRIDS)


# ---- the plan


SPLIT = """\
cover = Vision.select(cover, keep=64) at layer 0
split = (Vision - cover).select(split, keep=16) at layer 1
split2 = (Vision - (split | cover)).select(split, keep=10) at layer 2
split3 = (Vision - (split2 | split | cover)).select(split, keep=6) at layer 4
pool edits cover at layer 0
pool edits split at layer 1
pool edits split2 at layer 2
pool edits split3 at layer 4
layer 0        run_on Text | cover
layer 1        run_on Text | split | cover
layers 2-3     run_on Text | split2 | split | cover
layers 4-7     run_on Text | split3 | split2 | split | cover"""

INJECT = """\
cover = Vision.select(cover, keep=0.25) at layer 0
pool edits cover at layer 0
detail edits cover at layer 1
detail edits cover at layer 2
detail edits cover at layer 4
layers 0-7     run_on Text | cover"""

ALONE = """\
cover = Vision.select(cover, keep=0.5) at layer 0
pool edits cover at layer 0
layers 0-7     run_on Text | cover"""


def test_plans():
    assert planned(DAPE(budget=64)) == SPLIT
    assert planned(DAPE(budget=0.25, mode="inject")) == INJECT
    assert planned(DAPE(budget=0.5, detail=())) == planned(DAPE(budget=0.5, detail=(0, 0, 0))) == ALONE


def test_a_budget_of_all_says_nothing():
    assert planned(DAPE(budget=1.0)) == planned(DAPE(budget=1.0, mode="inject")) == "layers 0-7     run_on All"


def test_stages_that_fall_on_one_layer_are_one():
    assert "keep=0.2) at layer 1" in planned(DAPE(budget=0.5), depth=4)


def test_layers_keep_their_kind():
    text = planned(VISOR(self_layers=[0, 2], cross_layers=[4, 7]), DAPE(budget=64, detail=(0, 0.5, 0)))
    assert text.endswith(
        "layer 0        run_on Text | cover\n"
        "layer 1        run_on Text\n"
        "layer 2        run_on Text | split | cover\n"
        "layer 3        run_on Text\n"
        "layer 4        run_on Text, attend_to Text | split | cover\n"
        "layers 5-6     run_on Text\n"
        "layer 7        run_on Text, attend_to Text | split | cover"
    )


def test_later_passes_choose_from_the_regions():
    text = planned(DAPE(budget=64), FastV(keep=8, at=5))
    assert "fastv = (split3 | split2 | split | cover).select" in text or "fastv = split3 | " in text
    assert text.endswith("layers 5-7     run_on Text | fastv")
    assert "stride = cover.select(stride, keep=3) at layer 0" in planned(DAPE(budget=9, mode="inject"), Stride(keep=3))


@pytest.mark.parametrize(
    ("plan", "p", "reason"),
    [
        (Plan(8, frozenset({"features"}), {"grid": "no grid, because"}), DAPE(), "no grid, because"),
        (Plan(8), DAPE(), "how an image's tokens lie on a grid is not known in this model"),
        ((DAPE(budget=9),), DAPE(), "an earlier pass leaves split3 .*cover.* from layer 0 on; expected whole images"),
        ((DivPrune(keep=9),), DAPE(), "an earlier pass leaves divprune from layer 0 on; expected whole images"),
        ((STS(keep=1.0, refine=9, at=4),), DAPE(), "an earlier pass leaves relevance from layer 4 on; expected whole"),
        ((VTW(at=0),), DAPE(), "an earlier pass leaves no vision tokens from layer 0 on"),
        ((VTW(at=2),), DAPE(), "an earlier pass leaves Nothing from layer 2 on; expected whole images"),
        ((DPVR(at=4),), DAPE(), "an earlier pass takes Vision out of layers 4-6"),
    ],
)
def test_refusals(plan, p, reason):
    if isinstance(plan, tuple):
        passes, plan = plan, Plan(8, GRIDS)
        for earlier in passes:
            earlier.change(plan)
    before = str(plan)
    assert re.fullmatch(f"{reason}.*", p.refuse(plan))
    assert str(plan) == before


def test_what_is_not_refused():
    for earlier in (VTW(at=5), STS(keep=1.0, refine=9, at=5), DPVR(at=4)):
        plan = Plan(8, GRIDS)
        earlier.change(plan)
        detail = () if isinstance(earlier, DPVR) else (0.25, 0.15, 0.1)
        assert DAPE(budget=9, detail=detail).refuse(plan) is None
        DAPE(budget=9, detail=detail).change(plan)
        plan.check()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DAPE(budget=0), r"^DAPE\.budget: expected an int >= 1 .*, got 0"),
        (lambda: DAPE(detail=(0.5, 2)), r"^DAPE\.detail: expected a list of at most 3 numbers in \[0, 1\] "),
        (lambda: DAPE(detail=(0.1,) * 4), r"^DAPE\.detail: expected a list of at most 3 numbers in \[0, 1\] "),
        (lambda: DAPE(mode="add"), r"^DAPE\.mode: expected "),
        (lambda: DAPE(matching="trained"), r"^DAPE\.matching: expected "),
    ],
)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_a_model_without_a_grid_refuses():
    tiny = family("llava_next")
    inputs = tiny.inputs([Row(1)])
    with torch.no_grad():
        expected = tiny.model(**inputs).logits
        with vr.applied(tiny.model, [DAPE()]):
            with pytest.warns(UserWarning, match="does nothing: an image has .* not a square grid"):
                torch.testing.assert_close(tiny.model(**inputs).logits, expected)
            assert "which is not a square grid" in vr.report(tiny.model).passes[0]["reason"]
        refused = pytest.raises(ValueError, match="was refused: an image has")
        with vr.applied(tiny.model, [DAPE()], strict=True), refused:
            tiny.model(**inputs)


@pytest.mark.slow
def test_a_budget_that_a_grid_cannot_meet():
    tiny = family("llava")
    with (
        vr.applied(tiny.model, [DAPE(budget=3)]),
        pytest.raises(ValueError, match="^a budget of 3 tokens cannot cover an image of 6 x 6 tokens .* at least 4"),
    ):
        tiny.model(**tiny.inputs([Row(1)]))


# ---- numerics, against an oracle that looks for the regions itself


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("rows", [[Row(1)], BATCH], ids=["one row", "padded batch"])
@pytest.mark.parametrize(
    "dape", [DAPE(budget=36), DAPE(budget=99, matching="learned"), DAPE(budget=36, mode="inject"), DAPE(budget=1.0)]
)
def test_a_budget_of_all_is_the_original(dape, rows):
    tiny = family("llava")
    inputs = tiny.inputs(rows)
    with torch.no_grad():
        expected = tiny.model(**inputs).logits[real(inputs)]
        with vr.applied(tiny.model, [dape]):
            got = tiny.model(**inputs).logits[real(inputs)]
            assert not [
                s for s in vr.kept_tokens(tiny.model) if int(s.vision.sum()) != 36 * sum(r.images for r in rows)
            ]
    torch.testing.assert_close(got, expected, atol=2e-5 * float(expected.abs().max()), rtol=0)
    if len(rows) == 1:
        assert torch.equal(got, expected)


@pytest.mark.slow
def test_counts_grow_over_depth_and_cost_falls_with_the_budget():
    tiny, totals = family("llava"), []
    inputs = tiny.inputs([Row(1, 2, 3), Row(1, 2, 3)])
    for budget, lengths in ((4, [4, 6, 6, 6]), (10, [10, 14, 15, 15]), (0.5, [18, 25, 27, 27])):
        with torch.no_grad(), vr.applied(tiny.model, [DAPE(budget=budget)]):
            cache = tiny.model(**inputs).past_key_values
            totals.append(vr.report(tiny.model).totals["after"]["flops"])
        assert cache.kv_lengths() == [5 + n for n in lengths]
    assert totals == sorted(set(totals))


def test_sizes_of_regions_vary_and_follow_the_picture():
    """A picture that is flat but for one corner: the tokens go there."""
    features = torch.zeros(64, 16)
    corner = [r * 8 + c for r in range(4) for c in range(4)]
    features[corner] = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    stream, grid = torch.randn(1, 70, 16), torch.tensor([[8, 8]])
    prompt = torch.arange(70)[None] >= 64
    args = (features, stream, prompt, torch.arange(64), grid, torch.ones(64, dtype=torch.bool), torch.tensor([64]))
    for k, sizes in ((4, [16] * 4), (7, [4] * 4 + [16] * 3), (19, [1] * 16 + [16] * 3)):
        cover = torch.ops.vlm.dape_cover(*args, torch.tensor([k]))
        owner, _ = regions.region_owner(cover, args[-1], grid)
        assert sorted(owner.bincount()[owner.unique()].tolist()) == sizes
        assert int(cover[corner].sum()) == k - 3


def test_text_draws_the_regions_it_matches():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 16, generator=generator)
    blocks = regions.representatives(torch.tensor([64]), torch.tensor([[8, 8]]))
    none = gains(features, blocks, features[:0])
    drawn = gains(features, blocks, features[[18]])
    ratio = (drawn / none.clamp(min=1e-9)).round(decimals=3)
    assert ratio[0, 18] == 11 and ratio[1, blocks[1, 18]] == 11 and ratio[2, blocks[2, 18]] == 11
    assert (ratio[0] == 1).sum() > 50


# ---- detail


@given(st.integers(0, 99))
def test_the_regions_with_the_largest_attention_times_density_are_split(seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(64, 4, generator=generator) * torch.rand(64, 1, generator=generator)
    attention, lengths, grid = torch.rand(64, generator=generator), torch.tensor([64]), torch.tensor([[8, 8]])
    cover, value = regions.coarsest(lengths, grid, [64]), {}
    attention[~cover] = 0
    for token in cover.nonzero()[:, 0].tolist():
        r, c = token // 8 // 4 * 4, token % 8 // 4 * 4
        inside = [i * 8 + j for i in range(r, r + 4) for j in range(c, c + 4)]
        value[token] = float(attention[token] * features[inside].var(0, unbiased=False).mean())
    added = torch.ops.vlm.dape_split(attention, features, grid, ~cover, lengths, torch.tensor([3]))
    first = max(value, key=value.__getitem__)
    assert added.nonzero()[:, 0].tolist() == [first + 2, first + 16, first + 18]
    attention[:] = torch.where(torch.arange(64) == first, attention, 0.0)
    added = torch.ops.vlm.dape_split(attention, features, grid, ~cover, lengths, torch.tensor([15]))
    owner, _ = regions.region_owner(cover, lengths, grid)
    assert torch.equal(added, (owner == first) & ~cover)


def detail_case(seed=0, tokens=9):
    """Arguments of dape_inject for two images of 6 x 6 and 5 x 3 in two rows, the first padded by 2."""
    generator = torch.Generator().manual_seed(seed)
    lengths, grid = torch.tensor([36, 15]), torch.tensor([[6, 6], [5, 3]])
    base = regions.coarsest(lengths, grid, [36, 15])
    more = [tokens - 4, 4]
    member = base | regions.refined(base, lengths, grid, torch.rand(3, 51, generator=generator), more)
    vision = torch.zeros(2, 45, dtype=torch.bool)
    vision[0, 4:40], vision[1, 20:35] = True, True
    flat = vision.flatten().nonzero()[:, 0]
    kept = torch.zeros_like(vision).masked_scatter(vision, member)
    index, valid = torch.ops.vlm.token_index(kept, None, int(kept.sum(1).max()))
    hidden = torch.randn(2, index.shape[1], 8, generator=generator)
    features, attention = torch.randn(51, 8, generator=generator), torch.rand(51, generator=generator)
    torch.manual_seed(seed)
    block = Detail(8)
    block.gate.data.fill_(0.3)
    weights = [getattr(block, name) for name in Detail.NAMES]
    return hidden, index, valid, attention, features, ~vision, flat, lengths, grid, weights


@pytest.mark.parametrize("share", [0.0, 0.25, 0.6, 1.0])
def test_detail_by_loops(share):
    hidden, index, valid, attention, features, prompt, flat, lengths, grid, weights = detail_case()
    args = (hidden, index, valid, attention, features, prompt, flat, lengths, grid)
    got = torch.ops.vlm.dape_inject(*args, *weights, share)
    query, key, value, out, gate = weights
    place, changed = {int(f): i for i, f in enumerate(flat)}, 0
    for row, (start, end, rows, columns) in enumerate(((0, 36, 6, 6), (36, 51, 5, 3))):
        slots = {place[row * 45 + int(c)]: i for i, (c, v) in enumerate(zip(index[row], valid[row], strict=True)) if v}
        tokens = {f - start for f in slots}
        owner = [token_of(i, tokens, rows, columns) for i in range(end - start)]
        inside = {t: [start + i for i, o in enumerate(owner) if o == t] for t in tokens}
        dense = {t: float(features[u].var(0, unbiased=False).mean()) for t, u in inside.items()}
        best = sorted(tokens, key=lambda t: -float(attention[start + t]) * dense[t])[: round(share * len(tokens))]
        for t in tokens:
            h, u = hidden[row, slots[start + t]], features[inside[t]]
            if t in best and len(u) > 1:
                weight = ((u @ key.T) @ (query @ h) / 8).softmax(0)
                h = h + torch.tanh(gate) * (out @ (weight @ (u @ value.T)))
                changed += 1
            torch.testing.assert_close(got[row, slots[start + t]], h)
    assert torch.equal(got[~valid], hidden[~valid])
    assert int((got != hidden).any(-1).sum()) == changed
    assert (changed > 0) == (share > 0)


def test_gradients_of_a_detail_block():
    *args, weights = detail_case()
    args[0].requires_grad_()
    args[4].requires_grad_()
    torch.ops.vlm.dape_inject(*args, *weights, 0.5).square().sum().backward()
    for x in (args[0], args[4], *weights):
        assert x.grad is not None and x.grad.abs().max() > 0
    weights[-1].data.zero_()
    assert torch.equal(torch.ops.vlm.dape_inject(*args, *weights, 0.5), args[0])


@pytest.mark.parametrize("rows", [[Row(1)], BATCH], ids=["one row", "padded batch"])
def test_detail_that_has_not_learned_is_no_detail(rows):
    tiny = family("llava")
    inputs = tiny.inputs(rows)
    with torch.no_grad():
        results = []
        for dape, gate in ((DAPE(9, ()), None), (DAPE(9, mode="inject"), None), (DAPE(9, mode="inject"), 0.5)):
            with vr.applied(tiny.model, [dape]):
                for name, p in tiny.model.named_parameters():
                    if name.endswith(".gate") and gate is not None:
                        p.data.fill_(gate)
                results.append(tiny.model(**inputs).logits[real(inputs)])
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2]).abs().max() > 1e-3


@pytest.mark.slow
def test_everything_trained_learns_from_the_output():
    tiny = family("llava")
    inputs = tiny.inputs(BATCH)
    torch.manual_seed(0)
    dape = DAPE(budget=9, mode="inject", matching="learned")
    with vr.applied(tiny.model, [dape]):
        trained = {n: p for n, p in tiny.model.named_parameters() if p.requires_grad}
        assert len(trained) == len(Matching.NAMES) + 2 * len(Detail.NAMES)
        with torch.no_grad():
            expected = tiny.model(**inputs).logits
        for first in (True, False):
            loss = tiny.model(**inputs).logits
            if first:
                torch.testing.assert_close(loss, expected)
            loss[real(inputs)].log_softmax(-1)[:, 9].sum().backward()
            for name, p in trained.items():
                moved = p.grad is not None and bool(p.grad.abs().max() > 0)
                assert moved == (not first or name.endswith(".gate") or "matching" in name), name
                p.grad = None
                if name.endswith(".gate"):
                    p.data.fill_(0.5)


def test_attention_outside_the_source():
    """It is what a selection from the other tokens is told."""
    tiny, told = family("llava"), {}

    half = Vision.select(Policy("stride", torch.ops.vlm.stride_sample.default), 9)
    sets = []
    for need, source in (("attention", half), ("attention_outside", Vision - half)):
        sets.append(source.select(Policy(need, teller(told, need), (need,)), 36, at=2))
    layers = [(Text | half, None, None)] * 2 + [(Text | sets[0] | sets[1], None, None)] * 2
    with torch.no_grad(), vr.applied(tiny.model, [strategies.Sets(tuple(layers))]):
        tiny.model(**tiny.inputs(BATCH))
    (inner, half), (outer, rest) = told["attention"], told["attention_outside"]
    assert torch.equal(half, ~rest) and torch.equal(inner, outer) and inner[half].min() > 0 and not inner[rest].any()


def teller(told, name):
    def tell(weights, member, lengths, keep):
        told[name] = weights, member
        return member.clone()

    return tell


# ---- operators, and the recipe


@pytest.mark.slow
def test_operators():
    hidden, index, valid, attention, features, prompt, flat, lengths, grid, weights = detail_case()
    member = torch.ones(51, dtype=torch.bool)
    owner = torch.arange(51)
    stream, keep = torch.randn(2, 45, 8), torch.tensor([9, 4])
    check, ops = torch.library.opcheck, torch.ops.vlm
    check(ops.dape_cover.default, (features, stream, prompt, flat, grid, member, lengths, keep))
    learned = [getattr(Matching(8), name).detach() for name in Matching.NAMES]
    check(ops.dape_cover.default, (features, stream, prompt, flat, grid, member, lengths, keep, *learned))
    cover = ops.dape_cover(features, stream, prompt, flat, grid, member, lengths, keep)
    check(ops.dape_split.default, (attention, features, grid, ~cover, lengths, torch.tensor([3, 0])))
    check(ops.dape_focus.default, (attention, features, owner, member, lengths, 0.5))
    check(ops.dape_pool.default, (hidden, index, valid, stream, flat, lengths, grid))
    check(
        ops.dape_inject.default, (hidden, index, valid, attention, features, prompt, flat, lengths, grid, *weights, 0.5)
    )


@pytest.mark.slow
def test_the_recipe():
    tiny = family("llava")
    inputs = tiny.inputs(BATCH)
    with torch.no_grad(), vr.applied(tiny.model, "dape-half"):
        out = tiny.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        stages = [int(s.vision[0].sum()) for s in vr.kept_tokens(tiny.model)]
    assert out.shape == (4, inputs["input_ids"].shape[1] + 3)
    assert stages == [36, 50, 54]


def test_weights_are_named_as_the_operators_take_them():
    for made in (Matching(8), Detail(8)):
        assert {name for name, _ in made.named_parameters()} == set(made.NAMES)
