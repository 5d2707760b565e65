"""Token sets and plans: their algebra, and the exact listing of what passes say."""

from __future__ import annotations

import operator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.small import planned
from vlmrewrite.passes import STS, FastV, Random, ShortV, Stride
from vlmrewrite.plan.call import Call
from vlmrewrite.plan.counts import TokenCounts
from vlmrewrite.plan.plan import Plan
from vlmrewrite.plan.substitution import substitute
from vlmrewrite.plan.tokens import All, Image, Last, Nothing, Text, Vision, contains
from vlmrewrite.plan.vocabulary import Policy

SOME = Policy("some", print)


def test_no_passes():
    assert planned() == "layers 0-7     run_on All"


def test_sts():
    assert planned(STS(keep=192, refine=64)) == (
        "repulsion = Vision.select(repulsion, keep=192) at layer 0\n"
        "relevance = repulsion.select(relevance, keep=64) at layer 4\n"
        "layers 0-3     run_on Text | repulsion\n"
        "layers 4-7     run_on Text | relevance"
    )


def test_fastv():
    assert planned(FastV(keep=0.5, at=2), depth=4) == (
        "fastv = Vision.select(fastv, keep=0.5) at layer 2\n"
        "layers 0-1     run_on All\n"
        "layers 2-3     run_on Text | fastv"
    )


def test_shortv_lets_text_see_what_it_saw():
    assert planned(Stride(keep=3, at=1), ShortV(layers=[0, 2]), depth=3) == (
        "stride = Vision.select(stride, keep=3) at layer 1\n"
        "layer 0        run_on Text, attend_to All\n"
        "layer 1        run_on Text | stride\n"
        "layer 2        run_on Text, attend_to Text | stride"
    )


def test_sts_without_the_second_stage():
    assert planned(STS(keep=0.5, refine=None)) == (
        "repulsion = Vision.select(repulsion, keep=0.5) at layer 0\nlayers 0-7     run_on Text | repulsion"
    )


def test_stride_and_random_at_depths():
    assert planned(Stride(keep=0.5, at=2), Random(keep=3, at=0.9)) == (
        "stride = Vision.select(stride, keep=0.5) at layer 2\n"
        "random = stride.select(random, keep=3) at layer 7\n"
        "layers 0-1     run_on All\n"
        "layers 2-6     run_on Text | stride\n"
        "layer 7        run_on Text | random"
    )


def test_a_later_pass_at_an_earlier_layer_goes_first_in_the_stream():
    assert planned(Random(keep=4, at=5), Stride(keep=9, at=1)) == (
        "stride = Vision.select(stride, keep=9) at layer 1\n"
        "random = stride.select(random, keep=4) at layer 5\n"
        "layer 0        run_on All\n"
        "layers 1-4     run_on Text | stride\n"
        "layers 5-7     run_on Text | random"
    )


def test_the_same_pass_twice():
    assert planned(Stride(keep=8), Stride(keep=4), depth=2) == (
        "stride = Vision.select(stride, keep=8) at layer 0\n"
        "stride2 = stride.select(stride, keep=4) at layer 0\n"
        "layers 0-1     run_on Text | stride2"
    )


def test_keeping_all_says_nothing():
    assert planned(STS(keep=1.0, refine=1.0), Random(keep=1.0)) == "layers 0-7     run_on All"


def test_attending_to_other_tokens_than_running_on():
    plan = Plan(4)
    plan.layer(1).run_on(Text).attend_to(All)
    plan.layer(2).run_on(Text)
    plan.narrow(SOME, 5, at=3)
    assert str(plan) == (
        "some = Vision.select(some, keep=5) at layer 3\n"
        "layer 0        run_on All\n"
        "layer 1        run_on Text, attend_to All\n"
        "layer 2        run_on Text\n"
        "layer 3        run_on Text | some"
    )


def test_narrowing_reaches_what_a_layer_attends_to():
    plan = Plan(2)
    plan.layer(1).run_on(Text).attend_to(All)
    plan.narrow(SOME, 5)
    assert str(plan.layers[1].keys) == "Text | Vision.some(5, at=0)"
    assert plan.layers[1].run_set == Text


def test_narrowing_keeps_the_kind_of_each_layer():
    plan = Plan(5)
    plan.layer(1).run_on(Text)
    plan.layer(2).run_on(Text).attend_to(All)
    plan.layer(3).run_on(Text | Image(0))
    plan.narrow(SOME, 3, at=1)
    assert str(plan) == (
        "some = Vision.select(some, keep=3) at layer 1\n"
        "layer 0        run_on All\n"
        "layer 1        run_on Text\n"
        "layer 2        run_on Text, attend_to Text | some\n"
        "layer 3        run_on Text | (Image(0) & some)\n"
        "layer 4        run_on Text | some"
    )


def test_narrowing_where_nothing_is_left():
    plan = Plan(4)
    plan.layer(2).run_on(Text)
    plan.layer(3).run_on(Text)
    assert plan.exhausted(1) is None
    assert plan.exhausted(0.5) == "an earlier pass leaves no vision tokens from layer 2 on"
    with pytest.raises(ValueError, match="nothing to select from: an earlier pass leaves no vision tokens from layer"):
        plan.narrow(SOME, 3, at=2)


def test_algebra():
    a, b = Vision.select(SOME, 3), Vision.select(SOME, 0.5)
    assert Text | Vision == All
    assert All - Text == Vision
    assert All - Vision == Text
    assert All & a == a
    assert a | Vision == Vision
    assert Text & Vision == Nothing
    assert (Text | a) & Vision == a
    assert Text & (Text | a) == Text
    assert a - Text == a
    assert a | Nothing == a
    assert All - Image(0) == Text | (Vision - Image(0))
    assert (Text | a) - b == Text | (a - b)
    assert (Text | a) & (Text | b) == Text | (a & b)
    assert Image(0) & Image(1) == Nothing
    assert (Vision - a) & a == Nothing
    assert contains(Text, Last)
    assert Last - Text == Nothing
    with pytest.raises(ValueError, match="Text - Last would drop the last prompt token"):
        Text - Last
    assert str((a | b) - Image(0)) == "(Vision.some(0.5, at=0) | Vision.some(3, at=0)) - Image(0)"
    assert contains(Vision, Image(1))
    assert contains(a, a.select(SOME, 1))
    assert not contains(a, b)
    later = Vision.select(SOME, 3, at=1)
    assert substitute(Text | later, Vision, b) == Text | b.select(SOME, 3, at=1)
    assert substitute(Text | a, Vision, b) == Text | a


@pytest.mark.parametrize("tokens", [Vision, Last, Image(0), Vision.select(SOME, 2), Nothing])
def test_layers_always_run_on_text(tokens):
    with pytest.raises(ValueError, match="run_on expects a set with all text tokens"):
        Plan(1).layer(0).run_on(tokens)
    with pytest.raises(ValueError, match="attend_to expects a set with all text tokens"):
        Plan(1).layer(0).attend_to(tokens)


def test_text_is_never_selected_from():
    for tokens in (All, Text, Last, Text | Image(0)):
        with pytest.raises(ValueError, match="only vision tokens can be selected from"):
            tokens.select(SOME, 2)


def test_a_set_that_is_chosen_later():
    plan = Plan(3)
    plan.layer(0).run_on(Text | Vision.select(SOME, 2, at=2))
    with pytest.raises(ValueError, match="layer 0 uses .* chosen later, at layer 2"):
        plan.check()


def test_a_selection_from_what_is_chosen_later():
    plan = Plan(3)
    plan.layer(2).run_on(Text | Vision.select(SOME, 5, at=2).select(SOME, 3, at=1))
    with pytest.raises(ValueError, match="at=1. uses .* chosen later, at layer 2"):
        plan.check()


def test_narrowing_leaves_earlier_selections_as_they_are():
    plan = Plan(3)
    plan.layer(2).run_on(Text | Vision.select(SOME, 5))
    plan.narrow(Policy("other", print), 3, at=1)
    assert str(plan) == (
        "some = Vision.select(some, keep=5) at layer 0\n"
        "other = Vision.select(other, keep=3) at layer 1\n"
        "layer 0        run_on All\n"
        "layer 1        run_on Text | other\n"
        "layer 2        run_on Text | (some & other)"
    )


def test_a_policy_with_unknown_needs():
    with pytest.raises(ValueError, match="policy 'x' needs 'colour'; expected one of features, encoder_features"):
        Policy("x", print, ("colour",))


CENSUS = TokenCounts(length=30, text=(4, 9, 1), images=(8, 5, 3), rows=(0, 0, 2), ordinals=(0, 1, 0), padded=True)


def test_census():
    half, three = Vision.select(SOME, 0.5), Vision.select(SOME, 3)
    assert CENSUS.per_row(Text) == ((4, 9, 1), True)
    assert CENSUS.per_row(Text | half) == ((10, 9, 3), True)
    assert CENSUS.per_row(Text | half.select(SOME, 3)) == ((9, 9, 3), True)
    assert CENSUS.per_row(Image(1)) == ((5, 0, 0), True)
    assert CENSUS.per_row(half | three)[1] is False
    assert CENSUS.size(Text | three) == 10
    assert CENSUS.dense(Last)
    assert not CENSUS.dense(All)
    assert not CENSUS.dense(Text)


def test_a_call_is_counted():
    """Its second row is padded on the left, and ends in a vision token, which counts as text too."""
    assert Call(VISION, PADDING, [3, 2, 6]).counts == TokenCounts(
        length=9, text=(4, 2), images=(3, 2, 6), rows=(0, 0, 1), ordinals=(0, 1, 0), padded=True, overlap=True
    )


@given(st.integers(1, 600) | st.floats(0.001, 1), st.integers(0, 600))
def test_a_fraction_keeps_at_least_one(keep, n):
    counts = TokenCounts(n + 1, (1,), (n,), (0,), (0,), False)
    kept = counts.per_image(Vision.select(SOME, keep))[0][0]
    assert kept == min(n, keep if isinstance(keep, int) else max(1, round(keep * n)))


def sets():
    leaves = st.sampled_from([All, Text, Vision, Nothing, Image(0), Image(1), A, B])
    pairs = st.sampled_from([operator.or_, operator.and_, operator.sub])
    return st.recursive(leaves, lambda inner: st.builds(lambda f, a, b: f(a, b), pairs, inner, inner), max_leaves=8)


A, B = Vision.select(SOME, 2), Image(0).select(SOME, 3)
VISION = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1, 1, 1]], dtype=torch.bool)
PADDING = torch.tensor([[1] * 9, [0] * 2 + [1] * 7], dtype=torch.bool)
CALL = Call(VISION, PADDING, [3, 2, 6])
CHOSEN = {
    A: torch.tensor([1, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0], dtype=torch.bool),
    B: torch.tensor([1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0], dtype=torch.bool),
}


@given(sets(), sets(), st.sampled_from([operator.or_, operator.and_, operator.sub]))
def test_algebra_token_by_token(a, b, combine):
    ma, mb = CALL.members(a, CHOSEN), CALL.members(b, CHOSEN)
    pairwise = {operator.or_: ma | mb, operator.and_: ma & mb, operator.sub: ma & ~mb}[combine]
    got = CALL.members(combine(a, b), CHOSEN)
    real = PADDING.clone()
    real[1, -1] = False  # a last token that is vision counts as text and as vision
    assert torch.equal(got & real, pairwise & real)
    assert contains(a | b, a)
    assert contains(a, a & b)
    if contains(a, b):
        assert not ((mb & ~ma) & real).any()


@given(sets())
def test_counts_are_upper_bounds_and_exact_where_they_say_so(s):
    member = CALL.members(s, CHOSEN) & (PADDING | (s == All))
    (rows, exact), counted = CALL.counts.per_row(s), member.sum(1).tolist()
    if s == All:
        return
    assert all(n >= m for n, m in zip(rows, counted, strict=True))
    assert not exact or list(rows) == counted
