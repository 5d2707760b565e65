"""What policies choose, against brute force, and what is checked of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from vlmrewrite.ops.scoring import attention_received, checked, top_attention
from vlmrewrite.passes.divprune import divprune_sample
from vlmrewrite.passes.random import random_sample
from vlmrewrite.passes.stride import stride_sample
from vlmrewrite.passes.sts import EPSILON, sts_sample


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def brute_force_repulsion(x, k):
    """What is chosen in fp64; None where two tokens are so near to a tie that rounding decides in fp32."""
    x = x.double()
    chosen, score = [], (x - x.mean(0)).square().sum(1).tolist()
    while True:
        best, *others = sorted((i for i in range(len(x)) if i not in chosen), key=score.__getitem__)
        if others and score[others[0]] - score[best] < 1e-5 * max(score[best], 1):
            return None
        chosen.append(best)
        if len(chosen) == k:
            return sorted(chosen)
        score = [sum(1 / (float((y - x[j]).square().sum()) + EPSILON) for j in chosen) for y in x]


@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 9), st.integers(0, 999))
def test_repulsion_is_brute_force_at_each_step(n, k, channels, seed):
    x = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([n])
    expected = brute_force_repulsion(x, min(n, k))
    assume(expected is not None)
    chosen = sts_sample(x, torch.ones(n, dtype=torch.bool), lengths, torch.tensor([k]))
    assert chosen.nonzero()[:, 0].tolist() == expected


def test_repulsion_of_equal_tokens_takes_the_first():
    chosen = sts_sample(torch.zeros(6, 3), torch.ones(6, dtype=torch.bool), torch.tensor([6]), torch.tensor([3]))
    assert chosen.nonzero()[:, 0].tolist() == [0, 1, 2]


def brute_force_spread(x, k):
    """What is chosen in fp64; None where two tokens are so near to a tie that rounding decides in fp32."""
    x = torch.nn.functional.normalize(x.double(), dim=1)
    near = (x @ x.T).fill_diagonal_(-torch.inf)
    chosen, score = [], near.amax(1).tolist()
    while True:
        best, *others = sorted((i for i in range(len(x)) if i not in chosen), key=score.__getitem__)
        if others and score[others[0]] - score[best] < 1e-5:
            return None
        chosen.append(best)
        if len(chosen) == k:
            return sorted(chosen)
        score = [max(float(near[i, j]) for j in chosen) for i in range(len(x))]


@given(st.integers(2, 24), st.integers(1, 24), st.integers(3, 9), st.integers(0, 999))
def test_divprune_is_brute_force_at_each_step(n, k, channels, seed):
    x = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed))
    expected = brute_force_spread(x, min(n, k))
    assume(expected is not None)
    chosen = divprune_sample(x, torch.ones(n, dtype=torch.bool), torch.tensor([n]), torch.tensor([k]))
    assert chosen.nonzero()[:, 0].tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), st.data())
def test_every_sampler_chooses_the_right_number_of_members(images, data):
    lengths = torch.tensor([n for n, _ in images])
    total = int(lengths.sum())
    member = torch.tensor(data.draw(st.lists(st.booleans(), min_size=total, max_size=total)), dtype=torch.bool)
    parts = member.split(lengths.tolist())
    keep = torch.tensor([min(k, int(p.sum())) for (_, k), p in zip(images, parts, strict=True)])
    ordinal = torch.arange(len(images))
    for chosen in (
        sts_sample(randn(total, 3), member, lengths, keep),
        top_attention(randn(total), member, lengths, keep),
        stride_sample(member, lengths, keep),
        random_sample(ordinal, member, lengths, keep, 0),
    ):
        assert not (chosen & ~member).any()
        assert [int(c.sum()) for c in chosen.split(lengths.tolist())] == keep.tolist()


def test_stride_takes_floor_of_i_n_over_k():
    chosen = stride_sample(torch.ones(10, dtype=torch.bool), torch.tensor([10]), torch.tensor([4]))
    assert chosen.nonzero()[:, 0].tolist() == [0, 2, 5, 7]


def test_random_depends_on_the_seed_and_the_number_of_the_image():
    lengths, keep = torch.tensor([20, 20]), torch.tensor([5, 5])
    member = torch.ones(40, dtype=torch.bool)
    a, b = random_sample(torch.tensor([0, 1]), member, lengths, keep, 0).split(20)
    assert not torch.equal(a, b)
    assert torch.equal(a, random_sample(torch.tensor([1, 0]), member, lengths, keep, 0)[20:])
    assert not torch.equal(a, random_sample(torch.tensor([0, 1]), member, lengths, keep, 1)[:20])


def test_top_attention_breaks_ties_by_order():
    weights = torch.tensor([0.1, 0.3, 0.3, 0.3])
    chosen = top_attention(weights, torch.ones(4, dtype=torch.bool), torch.tensor([4]), torch.tensor([2]))
    assert chosen.tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ([True, True, True, False, False], r"chose \[3, 0\] tokens of the images; expected at most \[2, 2\]"),
        (
            [True, False, False, False, False],
            r"chose \[1, 0\] .*; expected \[2, 1\], for that many are asked for and left",
        ),
        ([False, False, False, True, True], r"chose \[0, 2\] tokens .* and only tokens that are left"),
        ([True, True, False, True], r"returned bool \(4,\); expected bool \(5,\)"),
    ],
    ids=["too many", "too few", "gone", "shape"],
)
def test_a_policy_that_chooses_what_it_must_not_is_told(chosen, expected):
    member = torch.tensor([True, True, True, True, False])
    with pytest.raises(ValueError, match=f"policy 'mine' {expected}"):
        checked(torch.tensor(chosen), member, torch.tensor([3, 2]), torch.tensor([2, 2]), "mine")


def test_attention_received_from_several_tokens_is_the_mean_of_what_each_pays():
    q, k = randn(1, 4, 3, 8), randn(1, 2, 6, 8)
    at, asked = torch.arange(6)[None], torch.tensor([[2, -1, 5]])  # the second is no token

    def received(t):
        read = at, torch.ones(1, 6, dtype=torch.bool), torch.tensor([0, 1, 4])
        return attention_received(q[:, :, t], k, None, asked[:, t], at, None, None, *read, 6)

    each = [received(slice(i, i + 1)) for i in (0, 2)]
    torch.testing.assert_close(received(slice(None)), (each[0] + each[1]) / 2)
    assert each[0][:2].all()
    assert not each[0][2]


def test_attention_received_is_computed_in_fp32():
    q, k, at = randn(1, 4, 1, 64).bfloat16() * 4, randn(1, 2, 9, 64).bfloat16(), torch.arange(9)[None]

    def received(q, k):
        read = at, torch.ones(1, 9, dtype=torch.bool), torch.arange(8)
        return attention_received(q, k, None, at[:, -1:], at, None, None, *read, 9)

    torch.testing.assert_close(received(q, k), received(q.double(), k.double()), atol=1e-6, rtol=1e-5)
