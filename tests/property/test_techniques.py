"""Branches, static and dispatched plans, drawn at random, agree with the oracle; keeping all tokens is the model."""

from __future__ import annotations

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmrewrite as vr
from tests.small import CHAIN, always, batches, family, long
from vlmrewrite.capture import hooks
from vlmrewrite.hf import decoder
from vlmrewrite.kvcache.cache import PositionCache
from vlmrewrite.passes import DPVR, STS, VISOR, DivPrune, Random, Stride
from vlmrewrite.testing import strategies
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import FAMILIES


def lists():
    dpvr = st.builds(
        DPVR,
        at=st.integers(0, 3),
        fuse=st.integers(0, 1),
        branch=st.sampled_from(["copy", "random", "identity"]),
    )
    other = st.one_of(
        st.builds(Stride, keep=strategies.budgets(), at=strategies.depths(4)),
        st.builds(Random, keep=strategies.budgets(), at=strategies.depths(4)),
        st.builds(STS, keep=strategies.budgets(), refine=strategies.budgets(), at=strategies.depths(4)),
        st.builds(VISOR, self_layers=st.just([0, 3]), cross_layers=st.sampled_from([[], [1], [1, 2]])),
    )
    return st.tuples(st.lists(other, max_size=1), dpvr, st.lists(other, max_size=1)).map(lambda t: [*t[0], t[1], *t[2]])


def names(llava, others):
    """LLaVA ``llava`` times as often as any other; without the long profile only LLaVA."""
    return st.sampled_from(["llava"] * llava + others if long() else ["llava"])


@given(
    names(6, sorted(FAMILIES)),
    strategies.rows(images=1),
    strategies.sides(),
    lists(),
    st.booleans(),
)
def test_branches_agree_with_the_oracle(name, rows, side, passes, generate):
    tiny = family(name)
    inputs = tiny.inputs(rows, side=side)
    if side == "left" and generate:
        generation_agreement(tiny.model, inputs, passes, strict=False).check()
    else:
        forward_agreement(tiny.model, inputs, passes, strict=False).check()


@st.composite
def visors(draw, depth=4):
    kinds = draw(st.lists(st.sampled_from("scstx"), min_size=depth, max_size=depth).filter(lambda k: {*k} & {*"sc"}))
    return VISOR(*([i for i, kind in enumerate(kinds) if kind == which] for which in "sc"))


@settings(max_examples=settings().max_examples * 3 // 4)
@given(
    st.data(),
    names(2, ["qwen2_5_vl"]),
    visors(),
    strategies.rows(),
    strategies.sides(),
    st.integers(0, 99),
)
def test_kinds_of_layers_agree_with_the_oracle(data, name, visor, rows, side, seed):
    keep, at = strategies.budgets(), strategies.depths(4)
    more = data.draw(
        st.lists(st.builds(STS, keep=keep, refine=keep, at=at) | st.builds(DivPrune, keep=keep), max_size=2)
    )
    passes = data.draw(st.permutations([visor, *more]))
    tiny = family(name)
    generation_agreement(tiny.model, tiny.inputs(rows, side=side, seed=seed), passes, 3, strict=False).check()


@given(
    names(4, sorted(FAMILIES)),
    strategies.rows(images=1),
    strategies.sides(),
    st.integers(0, 2),
    st.booleans(),
    st.lists(st.builds(Stride, keep=strategies.budgets(), at=strategies.depths(4)), max_size=1),
    st.lists(st.builds(Random, keep=strategies.budgets(), at=strategies.depths(4)), max_size=1),
)
def test_dispatched_plans_agree_with_the_oracle(name, rows, side, which, mlp, before, after):
    tiny = family(name)
    chain = [{**c, "sa_vision_mlp": mlp} for c in CHAIN]
    passes = [*before, VISOR(policy=always(which), chain=chain), *after]
    inputs = tiny.inputs(rows, side=side)
    (generation_agreement if side == "left" else forward_agreement)(tiny.model, inputs, passes, strict=False).check()


@given(batches(), strategies.sides(), st.integers(0, 9), names(1, ["llava_qwen2"]))
def test_keeping_all_is_bit_identical(llava, llava_qwen2, rows, side, seed, name):
    """With the same two functions in the unmodified model; at every token that is not padding."""
    tiny = {"llava": llava, "llava_qwen2": llava_qwen2}[name]
    inputs = tiny.inputs(rows, side=side, seed=seed)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        hooks.register()
        cache = PositionCache()
        with decoder.attention_swapped(tiny.model), hooks.running(cache):
            expected = tiny.model(**inputs, past_key_values=cache).logits
        for passes in (
            [STS(keep=1.0, refine=1.0)],
            [Stride(keep=99, at=1), Random(keep=99, at=3)],
            [STS(keep=99, refine=99)],
        ):
            with vr.applied(tiny.model, passes):
                assert torch.equal(tiny.model(**inputs).logits[real], expected[real])


@given(batches(), strategies.sides(), st.integers(0, 9))
def test_keeping_all_is_the_original_attention_within_rounding(llava, rows, side, seed):
    inputs = llava.inputs(rows, side=side, seed=seed)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        original = llava.model(**inputs).logits
        exact = (
            copy.deepcopy(llava.model).double()(**{**inputs, "pixel_values": inputs["pixel_values"].double()}).logits
        )
        with vr.applied(llava.model, [Stride(keep=1.0)]):
            got = llava.model(**inputs).logits
    budget = max(float((original - exact)[real].abs().max()), torch.finfo(torch.float32).eps * float(exact.abs().max()))
    assert float((got - exact)[real].abs().max()) <= 8 * budget
