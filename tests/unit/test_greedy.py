"""Greedy selection from products against the definition, which computes every distance at every pick."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmrewrite.ops import greedy
from vlmrewrite.passes.divprune import divprune_sample, spread
from vlmrewrite.passes.sts import repel, sts_sample

RULES = {"repulsion": (sts_sample, repel), "cosine": (divprune_sample, spread)}
KINDS = (
    "random",
    "one large channel",
    "far from zero",
    "copies",
    "near copies",
    "integers",
    "signs",
    "tiny",
    "huge",
    "zeros",
)


def features(kind, n, channels, seed):
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, generator=make)
    some = torch.randint(0, max(1, n // 3), (n,), generator=make)
    match kind:
        case "far from zero":
            return x + 50 * torch.randn(channels, generator=make)
        case "one large channel":
            small = 10.0 ** -(2 + seed % 3) * (1 + 0.3 * torch.rand(n, 1, generator=make)).expand(-1, channels)
            return torch.cat([x[:, :1].sign(), small[:, 1:]], 1)
        case "copies":
            return x[some]
        case "near copies":
            return x[some] + 10.0 ** -(1 + seed % 7) * torch.randn(n, channels, generator=make)
        case "integers":
            return (2 * x).round()
        case "signs":
            return x.sign()
        case "tiny":
            return x * 10.0 ** -(3 + seed % 30)
        case "huge":
            return x * 10.0 ** (3 + seed % 30)
        case "zeros":
            return x * (torch.rand(n, 1, generator=make) < 0.5)
    return x


class Picks(torch.nn.Module):
    def __init__(self, definition):
        super().__init__()
        self.definition = definition

    def forward(self, x):
        return self.definition(x, 5)


def defined(definition, x, member, lengths, keep):
    """The choice by the definition, one image at a time."""
    chosen, start = torch.zeros_like(member), 0
    for n, k in zip(lengths, keep, strict=True):
        left = start + member[start : start + n].nonzero()[:, 0]
        if k:
            chosen[left if k >= len(left) else left[definition(x[left].float(), k)]] = True
        start += n
    return chosen


def picked(op, x, member, lengths, keep):
    return op(x, member, torch.tensor(lengths), torch.tensor(keep))


@given(
    st.sampled_from(list(RULES)),
    st.sampled_from(KINDS),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([1, 2, 3, 9, 64, 128, 200, 384]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 999),
)
def test_picks_are_those_of_the_definition(rule, kind, n, k, channels, dtype, seed):
    op, definition = RULES[rule]
    x, member = features(kind, n, channels, seed).to(dtype), torch.ones(n, dtype=torch.bool)
    assert torch.equal(picked(op, x, member, [n], [k]), defined(definition, x, member, [n], [k]))


@pytest.mark.parametrize("kind", ["random", "near copies", "copies", "integers", "one large channel"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("keep", [[70, 70, 100], [300, 300, 200]])
def test_picks_are_those_of_the_definition_in_images_of_a_real_size(rule, kind, keep):
    op, definition = RULES[rule]
    lengths = [400, 400, 300]
    x, member = features(kind, 1100, 300, 3), torch.ones(1100, dtype=torch.bool)
    assert torch.equal(picked(op, x, member, lengths, keep), defined(definition, x, member, lengths, keep))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("scale", [1e-4, 1, 1e4])
def test_copies_are_picked_when_nothing_else_is_left(rule, scale):
    """Their potentials are some million times those of others, and differ by as little."""
    op, definition = RULES[rule]
    for seed in range(40):
        x, member = scale * features("copies", 40, 9, seed), torch.ones(40, dtype=torch.bool)
        assert torch.equal(picked(op, x, member, [40], [30]), defined(definition, x, member, [40], [30]))


@given(
    st.sampled_from(list(RULES)),
    st.lists(st.tuples(st.sampled_from([0, 3, 7, 8]), st.integers(0, 9)), min_size=1, max_size=5),
    st.booleans(),
    st.integers(0, 99),
)
def test_images_are_chosen_from_alone_whatever_is_batched(rule, images, whole, seed):
    op, definition = RULES[rule]
    lengths, keep = [n for n, _ in images], [k for _, k in images]
    x = features(KINDS[seed % len(KINDS)], sum(lengths), 5, seed)
    member = torch.rand(len(x), generator=torch.Generator().manual_seed(seed)) < (1.1 if whole else 0.7)
    assert torch.equal(picked(op, x, member, lengths, keep), defined(definition, x, member, lengths, keep))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES)
def test_without_room_for_all_products(rule, kind, monkeypatch):
    op, definition = RULES[rule]
    x, member = features(kind, 300, 20, 7), torch.ones(300, dtype=torch.bool)
    expected = defined(definition, x, member, [100, 100, 100], [30, 30, 9])
    monkeypatch.setattr(greedy, "ROOM", 0)
    assert torch.equal(picked(op, x, member, [100, 100, 100], [30, 30, 9]), expected)


@pytest.mark.parametrize(("ahead", "among", "room"), [((1, 1), 1, 2**24), ((2, 8), 2, 2**24), ((16, 64), 3, 1000)])
@given(
    st.sampled_from(list(RULES)),
    st.sampled_from(KINDS),
    st.lists(st.integers(2, 40), min_size=1, max_size=3),
    st.integers(1, 30),
    st.sampled_from([1, 3, 64]),
    st.integers(0, 999),
)
def test_rows_that_are_computed_ahead(monkeypatch, ahead, among, room, rule, kind, lengths, k, channels, seed):
    op, definition = RULES[rule]
    x, keep = features(kind, sum(lengths), channels, seed), [k] * len(lengths)
    member = torch.ones(len(x), dtype=torch.bool)
    expected = defined(definition, x, member, lengths, keep)
    for name, value in {"WORTH": 0, "AHEAD": ahead, "AMONG": among, "ROOM": room}.items():
        monkeypatch.setattr(greedy, name, value)
    assert torch.equal(picked(op, x, member, lengths, keep), expected)


def test_definitions_can_be_traced_whatever_the_width():
    for definition in (repel, spread):
        x = features("random", 30, 600, 2)
        program = torch.export.export(Picks(definition), (x,))
        assert torch.equal(program.module()(2 * x + 1), definition(2 * x + 1, 5))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e25])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_is_chosen_from_by_the_definition(rule, value):
    op, definition = RULES[rule]
    x, member = features("random", 24, 6, 1), torch.ones(24, dtype=torch.bool)
    x[3], x[17, 2] = value, value
    lengths, keep = [8, 8, 8], [4, 4, 4]
    chosen = picked(op, x, member, lengths, keep)
    assert torch.equal(chosen, defined(definition, x, member, lengths, keep))
    assert [int(c.sum()) for c in chosen.split(8)] == keep


@pytest.mark.parametrize("rule", RULES)
def test_under_autocast_and_with_short_products(rule):
    op, definition = RULES[rule]
    x, member = features("random", 120, 64, 5), torch.ones(120, dtype=torch.bool)
    expected = defined(definition, x, member, [120], [40])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(picked(op, x, member, [120], [40]), expected)
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert greedy.product_rounding(64, x.device)[1] == 2.0**-7
        if rule == "repulsion":  # what the first pick of the other one is, products say
            assert torch.equal(picked(op, x, member, [120], [40]), expected)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gap", [None, 0, 5, 11])
@pytest.mark.parametrize("laid", ["together", "apart", "by column", "expanded"])
@pytest.mark.parametrize("seed", range(8))
def test_images_that_follow_one_another_and_images_with_gaps(rule, gap, laid, seed):
    op, definition = RULES[rule]
    x = features("near copies", 36, 40, seed)
    match laid:
        case "apart":
            x = torch.stack([x, x], 1)[:, 0]
        case "by column":
            x = x.T.contiguous().T
        case "expanded":
            x = x[:, :1].expand(-1, 40)
    member, before = torch.ones(36, dtype=torch.bool), x.clone()
    if gap is not None:
        member[[gap, gap + 12, gap + 24]] = False
    got = picked(op, x, member, [12, 12, 12], [4, 4, 4])
    assert torch.equal(got, defined(definition, x, member, [12, 12, 12], [4, 4, 4]))
    assert torch.equal(x, before)
