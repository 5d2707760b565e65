"""FastV, DivPrune, VTW, ShortV and ViCA: what they say, when they are refused, what it means; and lists of layers."""

from __future__ import annotations

import functools
import itertools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmrewrite as vr
from tests.small import family
from tests.small import planned as of_passes
from vlmrewrite.passes import STS, VISOR, VTW, DivPrune, FastV, Random, ShortV, Stride, ViCA, divprune
from vlmrewrite.passes.divprune import divprune_sample
from vlmrewrite.plan import FEATURES
from vlmrewrite.plan.budget import chosen_layers
from vlmrewrite.plan.plan import Plan
from vlmrewrite.plan.tokens import All, Text, contains
from vlmrewrite.recipe import Recipe, shipped_recipes
from vlmrewrite.testing import strategies
from vlmrewrite.testing.agreement import generation_agreement
from vlmrewrite.testing.models import Row

TINY = family("llava")
RELATIVES = [FastV(), DivPrune(), VTW(), ShortV([1, 2]), ViCA([0, 3]), VISOR([0], [2])]
GREEDY = {"do_sample": False, "max_new_tokens": 3}
planned = functools.partial(of_passes, features=frozenset(FEATURES))


# ---- plan text


def test_fastv():
    assert planned(FastV()) == (
        "fastv = Vision.select(fastv, keep=0.5) at layer 2\n"
        "layers 0-1     run_on All\n"
        "layers 2-7     run_on Text | fastv"
    )


def test_divprune():
    assert planned(DivPrune()) == (
        "divprune = Vision.select(divprune, keep=0.1) at layer 0\nlayers 0-7     run_on Text | divprune"
    )


def test_vtw():
    assert planned(VTW()) == "layers 0-3     run_on All\nlayers 4-7     run_on Text"
    assert planned(VTW(at=0)) == "layers 0-7     run_on Text"


def test_shortv():
    assert planned(ShortV(layers=[5, 2, 4])) == (
        "layers 0-1     run_on All\n"
        "layer 2        run_on Text, attend_to All\n"
        "layer 3        run_on All\n"
        "layers 4-5     run_on Text, attend_to All\n"
        "layers 6-7     run_on All"
    )


def test_vica():
    assert planned(ViCA(cross=[0, 3])) == (
        "layer 0        run_on Text, attend_to All\n"
        "layers 1-2     run_on Text\n"
        "layer 3        run_on Text, attend_to All\n"
        "layers 4-7     run_on Text"
    )


@pytest.mark.parametrize(
    ("depth", "published"), [(32, [0, 1, 7, 8, 9, 10, 11, 14]), (40, [0, 6, 8, 9, 10, 13, 14, 16])]
)
def test_the_published_layers_of_vica(depth, published):
    plan = Plan(depth)
    assert ViCA().refuse(plan) is None
    ViCA().change(plan)
    assert [entry.index for entry in plan.layers if entry.keys == All] == published
    assert all(entry.run_set == Text for entry in plan.layers)


def test_in_combination():
    assert planned(DivPrune(keep=9), FastV(keep=4, at=1), ShortV(layers=[2]), VTW(at=6)) == (
        "divprune = Vision.select(divprune, keep=9) at layer 0\n"
        "fastv = divprune.select(fastv, keep=4) at layer 1\n"
        "layer 0        run_on Text | divprune\n"
        "layer 1        run_on Text | fastv\n"
        "layer 2        run_on Text, attend_to Text | fastv\n"
        "layers 3-5     run_on Text | fastv\n"
        "layers 6-7     run_on Text"
    )


def test_pruning_after_layers_of_other_kinds():
    assert planned(ViCA(cross=[0, 3]), STS(keep=9, refine=4, at=2)) == (
        "repulsion = Vision.select(repulsion, keep=9) at layer 0\n"
        "relevance = repulsion.select(relevance, keep=4) at layer 2\n"
        "layer 0        run_on Text, attend_to Text | repulsion\n"
        "layers 1-2     run_on Text\n"
        "layer 3        run_on Text, attend_to Text | relevance\n"
        "layers 4-7     run_on Text"
    )


def test_the_second_stage_of_sts_is_left_out_where_nothing_is_left():
    in_order = planned(STS(keep=9, refine=4, at=4), VTW(at=2))
    assert planned(VTW(at=2), STS(keep=9, refine=4, at=4)) == in_order
    assert in_order == (
        "repulsion = Vision.select(repulsion, keep=9) at layer 0\n"
        "layers 0-1     run_on Text | repulsion\n"
        "layers 2-7     run_on Text"
    )


STATIC = [VTW(at=5), ShortV([1, 2, 6]), ViCA([0, 2, 6]), VISOR([0, 1], [2, 4, 6])]


@given(st.permutations([*STATIC, Stride(keep=0.5), Random(keep=3, at=1)]))
def test_passes_only_take_away(passes):
    plan = Plan(8)
    for p in passes:
        before = plan.copy()
        if p.refuse(plan) is None:
            p.change(plan)
        plan.check()
        for old, new in zip(before.layers, plan.layers, strict=True):
            assert type(p) in (Stride, Random) or contains(old.run_set, new.run_set)
            assert type(p) in (Stride, Random) or contains(old.keys, new.keys)
            assert contains(new.keys, new.run_set) or old.keys != old.run_set
            assert new.run_set == Text or old.run_set != Text
            assert new.keys == Text or old.keys != Text


@pytest.mark.parametrize("several", [2, 3, 4])
def test_the_order_of_passes_that_choose_no_tokens_does_not_matter(several):
    for some in itertools.combinations(STATIC, several):
        texts = set()
        for order in itertools.permutations(some):
            plan = Plan(8)
            for p in order:
                if p.refuse(plan) is None:
                    p.change(plan)
            texts.add(str(plan))
        assert len(texts) == 1


# ---- refusals and bad input


@pytest.mark.parametrize(
    ("before", "refused", "reason"),
    [
        ([VTW(at=2)], FastV(at=2), "an earlier pass leaves no vision tokens from layer 2 on"),
        ([VTW(at=2)], Stride(keep=3, at=0.5), "an earlier pass leaves no vision tokens from layer 4 on"),
        ([VTW(at=2)], Random(keep=3, at=5), "an earlier pass leaves no vision tokens from layer 5 on"),
        ([VTW(at=2)], VTW(at=3), "an earlier pass leaves no vision tokens from layer 3 on"),
        ([VTW(at=0)], DivPrune(), "an earlier pass leaves no vision tokens from layer 0 on"),
        ([VTW(at=0)], STS(), "an earlier pass leaves no vision tokens from layer 0 on"),
        ([VTW(at=0)], ViCA(cross=[1]), "an earlier pass leaves no vision tokens from layer 0 on"),
        ([VTW(at=0)], VISOR([1]), "an earlier pass leaves no vision tokens from layer 0 on"),
        ([VTW(at=2)], ShortV([2, 7]), "an earlier pass leaves no vision tokens to freeze in layers 2, 7"),
        ([ShortV([1])], ShortV([1]), "an earlier pass leaves no vision tokens to freeze in layers 1"),
        ([], ViCA(), "cross layers are published for 32 and 40 decoder layers, this model has 8; give `cross`"),
    ],
)
def test_refusals(before, refused, reason):
    plan = Plan(8)
    for p in before:
        p.change(plan)
    text = str(plan)
    assert refused.refuse(plan) == reason
    assert str(plan) == text


def test_a_refusal_changes_nothing_and_is_reported():
    inputs = TINY.inputs([Row(1)])
    program = vr.trace(TINY.model, inputs)
    rewritten = vr.rewrite(program, [VTW(at=1), FastV(at=2)])
    assert str(rewritten.plan) == str(vr.rewrite(program, [VTW(at=1)]).plan)
    assert [o.reason for o in rewritten.outcomes] == [None, "an earlier pass leaves no vision tokens from layer 2 on"]
    with pytest.raises(ValueError, match=r"FastV\(keep=0.5, at=2, per=.image.\) was refused: an earlier pass"):
        vr.rewrite(program, [VTW(at=1), FastV(at=2)], strict=True)


@pytest.mark.parametrize("wrong", [FastV(at=8), VTW(at=9), ShortV([1, 8]), ViCA([8]), VISOR([0], [8])])
def test_a_layer_that_is_not_there(wrong):
    plan = Plan(8)
    with pytest.raises(ValueError, match=r"expected a layer in 0 \.\. 7 \(the decoder has 8\), got [89]"):
        wrong.change(plan)
    assert str(plan) == "layers 0-7     run_on All"
    before = TINY.model.__dict__.copy()
    with pytest.raises(ValueError, match=r"expected a layer in 0 \.\. 3"):
        vr.apply(TINY.model, [wrong])
    assert TINY.model.__dict__ == before


LIST = "expected a list of different layers (int >= 0, or float in [0, 1): fraction of the depth), or a float in (0, 1]"


@pytest.mark.parametrize("make", [ShortV, ViCA, VISOR])
@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        ([1, 1], "got [1, 1] (list)"),
        ([0, 0.0], "got [0, 0.0] (list)"),
        ([2, -1], "got [2, -1] (list)"),
        ([1.0], "got [1.0] (list)"),
        ([float("nan")], "got [nan] (list)"),
        ([True], "got [True] (list)"),
        (["1"], "got ['1'] (list)"),
        (3, "got 3"),
        (0.0, "got 0.0"),
        (1.5, "got 1.5"),
        ("01", "got '01' (str)"),
        ({1, 2}, "got {1, 2} (set)"),
    ],
)
def test_what_is_no_list_of_layers(make, wrong, shown):
    with pytest.raises(ValueError, match=rf"{re.escape(LIST)}.*, {re.escape(shown)}$"):
        make(wrong)


def test_an_empty_list_of_layers():
    with pytest.raises(ValueError, match=r"^ShortV: expected at least one layer to freeze .*, got layers=\[\]$"):
        ShortV(layers=[])
    with pytest.raises(ValueError, match=r"^ViCA: expected at least one layer in which text .*, got cross=\[\]$"):
        ViCA(cross=[])


@pytest.mark.parametrize("seed", [-1, 2**32, 2**70, -(2**70)])
def test_a_seed_that_no_generator_takes(seed):
    limit = "less than 4294967296" if seed > 0 else "greater than or equal to 0"
    with pytest.raises(ValueError, match=rf"^Random\.seed: expected {limit}, got {seed}$"):
        Random(keep=1, seed=seed)


def test_the_largest_seed_works():
    member, one = torch.ones(9, dtype=torch.bool), torch.tensor([9])
    largest = Random(keep=1, seed=2**32 - 1)
    chosen = torch.ops.vlm.random_sample(torch.tensor([999]), member, one, torch.tensor([4]), largest.seed)
    assert int(chosen.sum()) == 4


# ---- lists of layers


@given(st.integers(1, 80), st.floats(0, 1, exclude_min=True), st.data())
def test_a_share_of_the_layers_is_spaced_evenly(depth, share, data):
    among = sorted(data.draw(st.sets(st.integers(0, depth - 1))))
    layers = chosen_layers(share, depth, among)
    assert layers == sorted(set(layers))
    assert set(layers) <= set(among)
    assert len(layers) == min(len(among), max(1, round(share * depth)))
    gaps = {b - a for a, b in itertools.pairwise(among.index(i) for i in layers)}
    assert not gaps or max(gaps) - min(gaps) <= 1


def test_fractions_of_the_depth_and_layers_mix():
    assert chosen_layers((5, 0.5, 0.0), 8) == [0, 4, 5]
    assert chosen_layers((0.0, 0.1), 8) == [0]
    assert chosen_layers((0.0, 0.1), 80) == [0, 8]
    assert chosen_layers(1.0, 3) == [0, 1, 2]
    assert chosen_layers((), 3) == []


def test_lists_become_tuples():
    assert ShortV([1, np.float64(0.5)]).layers == (1, 0.5)
    assert ShortV((1, 2)) == ShortV([1, 2])
    assert repr(ViCA([3, 0])) == "ViCA(cross=(3, 0))"
    assert hash(ShortV([1])) == hash(ShortV((1,)))


def test_recipes_keep_layers(tmp_path):
    recipe = Recipe(name="a", passes=(ShortV([1, 0.5]), ShortV(0.25), ViCA(), ViCA([2]), VISOR([], [0]), DivPrune()))
    recipe.to_yaml(tmp_path / "a.yaml")
    assert Recipe.load(tmp_path / "a.yaml") == recipe


@pytest.mark.parametrize("depth", [3, 4, 24, 28, 32, 40, 80])
@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_fit_every_depth(name, depth):
    planned(*Recipe.load(name).passes, depth=depth)


# ---- DivPrune's operator


def brute_force(x, k):
    distance = 1 - F.normalize(x.double(), dim=1) @ F.normalize(x.double(), dim=1).T
    n = len(x)
    others = [min((float(distance[i, j]) for j in range(n) if j != i), default=0) for i in range(n)]
    chosen = [max(range(n), key=lambda i: others[i])]
    while len(chosen) < k:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: min(float(distance[i, j]) for j in chosen)))
    return sorted(chosen)


@given(st.integers(1, 24), st.integers(1, 24), st.integers(2, 9), st.sampled_from([1, 3, 512]), st.integers(0, 999))
def test_divprune_is_brute_force(n, k, channels, block, seed):
    x = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(divprune, "SIDE", block)
        chosen = divprune_sample(x, torch.ones(n, dtype=torch.bool), torch.tensor([n]), torch.tensor([k]))
    if n > 2 and channels == 2:  # on a circle distances are too close for fp32 to order them as fp64 does
        assert int(chosen.sum()) == min(n, k)
    else:
        assert chosen.nonzero()[:, 0].tolist() == brute_force(x, min(n, k))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_divprune_of_equal_tokens_takes_the_first(value):
    x = torch.full((6, 3), value)
    chosen = divprune_sample(x, torch.ones(6, dtype=torch.bool), torch.tensor([6]), torch.tensor([3]))
    assert chosen.nonzero()[:, 0].tolist() == [0, 1, 2]


def test_divprune_starts_with_the_farther_neighbour():
    degrees = torch.tensor([0.0, 10, 90, 130, 181])  # nearest others at 10, 10, 40, 40, 51
    x = torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], 1) * torch.tensor([[1.0], [9], [2], [5], [0.1]])
    for k, expected in ((1, [4]), (2, [0, 4]), (3, [0, 2, 4]), (4, [0, 2, 3, 4])):
        chosen = divprune_sample(x, torch.ones(5, dtype=torch.bool), torch.tensor([5]), torch.tensor([k]))
        assert chosen.nonzero()[:, 0].tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), st.data())
def test_divprune_looks_at_each_image_for_itself(images, data):
    lengths = torch.tensor([n for n, _ in images])
    total = int(lengths.sum())
    member = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), dtype=torch.bool)
    keep = torch.tensor([k for _, k in images])
    x = torch.randn(total, 3, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    parts = divprune_sample(x, member, lengths, keep).split(lengths.tolist())
    spans = lengths.cumsum(0).tolist()
    for part, end, n, k in zip(parts, spans, lengths.tolist(), keep.tolist(), strict=True):
        left = member[end - n : end]
        assert not (part & ~left).any()
        assert int(part.sum()) == min(k, int(left.sum()))
        own = x[end - n : end][left]
        m = torch.tensor([len(own)])
        alone = divprune_sample(own, torch.ones(len(own), dtype=torch.bool), m, torch.tensor([k]))
        assert torch.equal(part[left], alone)


@given(st.integers(2, 20), st.integers(1, 9), st.sampled_from([-8, -1, 3, 10]), st.integers(0, 99))
def test_divprune_does_not_depend_on_scale(n, k, power, seed):
    x = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    given_tokens = torch.ones(n, dtype=torch.bool), torch.tensor([n]), torch.tensor([k])
    assert torch.equal(divprune_sample(x, *given_tokens), divprune_sample(x * 2.0**power, *given_tokens))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    member = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1], dtype=torch.bool)
    sample = x, member, torch.tensor([5, 0, 4]), torch.tensor([2, 0, 4])
    op = torch.ops.vlm.divprune_sample.default
    torch.library.opcheck(op, sample, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(op(*sample), divprune_sample(*sample))


def test_divprune_is_fp32_under_autocast_and_with_gradients():
    x = 1 + 0.02 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    asked = torch.ones(64, dtype=torch.bool), torch.tensor([64]), torch.tensor([3])
    expected = divprune_sample(x, *asked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(torch.ops.vlm.divprune_sample(x, *asked), expected)
        assert torch.equal(divprune_sample(x, *asked), expected)
    assert torch.equal(divprune_sample(x.requires_grad_(), *asked), expected)


# ---- numerics


def layer_lists(depth):
    return st.lists(st.integers(0, depth - 1), min_size=1, unique=True) | st.sampled_from([0.25, 0.5, [0.0, 0.6]])


@st.composite
def relatives(draw, depth=4):
    keep, at = strategies.budgets(), strategies.depths(depth)
    kinds = draw(st.lists(st.sampled_from(["self", "cross", "text"]), min_size=depth, max_size=depth))
    chosen = [[i for i, kind in enumerate(kinds) if kind == which] for which in ("self", "cross")]
    one = st.one_of(
        st.builds(FastV, keep=keep, at=at),
        st.builds(DivPrune, keep=keep),
        st.builds(VTW, at=st.integers(1, depth - 1)),
        st.builds(ShortV, layers=layer_lists(depth)),
        st.builds(ViCA, cross=layer_lists(depth)),
        st.just(VISOR(*chosen) if any(chosen) else VTW(at=0)),
        st.builds(STS, keep=keep, refine=st.none() | keep, at=at),
        st.builds(Stride, keep=keep, at=at),
    )
    return draw(st.lists(one, min_size=1, max_size=4))


@settings(max_examples=settings().max_examples * 3 // 4)
@given(relatives(), strategies.rows(), strategies.sides(), st.integers(0, 99))
def test_generation_agrees_with_the_oracle(passes, rows, side, seed):
    generation_agreement(TINY.model, TINY.inputs(rows, side=side, seed=seed), passes, 3, strict=False).check()


@pytest.mark.parametrize("p", RELATIVES, ids=lambda p: p.name)
def test_each_agrees_with_the_oracle(p):
    inputs = TINY.inputs([Row(1), Row(2, 3, 1)], seed=3)
    agreement = generation_agreement(TINY.model, inputs, [p], 2)
    agreement.check()
    with torch.no_grad():
        plain = TINY.model(**inputs).logits[:, -1]
        with vr.applied(TINY.model, [p]):
            assert (TINY.model(**inputs).logits[:, -1] - plain).abs().max() > 100 * agreement.tolerance


@pytest.mark.parametrize("p", [FastV(keep=1.0), DivPrune(keep=1.0), DivPrune(keep=99)], ids=repr)
def test_keeping_all_is_the_original(p):
    inputs = TINY.inputs([Row(1), Row(2, 3, 1)], seed=3)
    with torch.no_grad():
        expected = TINY.model(**inputs).logits
        with vr.applied(TINY.model, [p]):
            got = TINY.model(**inputs).logits
    real = inputs["attention_mask"].bool()
    if p.keep == 1.0:
        assert torch.equal(got[real], expected[real])
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("p", RELATIVES, ids=lambda p: p.name)
def test_without_an_image_nothing_changes(p):
    inputs = TINY.inputs([Row(0, 4, 2), Row(0, 1, 2)], seed=3)
    expected = TINY.model.generate(**inputs, **GREEDY)
    with vr.applied(TINY.model, [p]):
        assert torch.equal(TINY.model.generate(**inputs, **GREEDY), expected)


@pytest.mark.parametrize(
    ("p", "lengths"),
    [
        (FastV(keep=4, at=1), [21, 9, 9, 9]),
        (DivPrune(keep=5), [10, 10, 10, 10]),
        (VTW(at=3), [21, 21, 21, 5]),
        (ShortV([1, 2]), [21, 21, 21, 21]),
        (ViCA([0, 3]), [21, 5, 5, 21]),
    ],
    ids=repr,
)
def test_keys_and_values_of_each_layer(p, lengths):
    inputs = TINY.inputs([Row(1, 2, 3)])
    with torch.no_grad(), vr.applied(TINY.model, [p]):
        assert TINY.model(**inputs).past_key_values.kv_lengths() == lengths
        assert generation_agreement_lengths(inputs) == [n + 2 for n in lengths]


def generation_agreement_lengths(inputs):
    return TINY.model.generate(**inputs, **GREEDY, return_dict_in_generate=True).past_key_values.kv_lengths()


def test_what_the_text_never_attends_to_does_not_matter():
    inputs = TINY.inputs([Row(1)], seed=3)
    other = inputs | {"pixel_values": -inputs["pixel_values"]}
    for p, blind in ((VTW(at=0), True), (VTW(at=1), False), (ViCA([3]), False), (FastV(keep=1, at=0), False)):
        with torch.no_grad(), vr.applied(TINY.model, [p]):
            a, b = (TINY.model(**given).logits[:, -1] for given in (inputs, other))
        assert torch.equal(a, b) == blind
