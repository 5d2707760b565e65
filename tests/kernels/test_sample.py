"""Greedy sampling by several programs at once, against the references and against what each step promises."""

from __future__ import annotations

import contextlib

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmrewrite.kernels.greedy import sample
from vlmrewrite.kernels.greedy.lookahead import NEAR
from vlmrewrite.kernels.greedy.sample import greedy
from vlmrewrite.kernels.greedy.start import ordered
from vlmrewrite.ops.device import interpreted
from vlmrewrite.passes import sts
from vlmrewrite.passes.divprune import divprune_sample
from vlmrewrite.passes.sts import sts_sample
from vlmrewrite.testing.triton.interleaving import interleaved
from vlmrewrite.testing.triton.interpreter import guarded

DEVICE = "cpu" if interpreted() else "cuda"
REFERENCES = {"repulsion": sts_sample, "cosine": divprune_sample}
UNIT = 2.0**-24
RULES = st.sampled_from(list(REFERENCES))
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
TILES = st.sampled_from([{}, {"rows": 2}, {"rows": 4, "width": 4}, {"rows": 2, "width": 7}, {"rows": 1, "width": 3}])
"""In registers, and looking ahead; by one program for each image, and by several."""


def search(rule, x, member, lengths, keep, seed=0, **tiles):
    """The kernel's choice and order, on guarded copies of what it is given, with its programs in turns."""
    (x, check_x), (member, check_member) = guarded(x.to(DEVICE)), guarded(member.to(DEVICE))
    turns = interleaved(seed) if interpreted() and "width" in tiles else contextlib.nullcontext()
    lengths, keep = torch.tensor(lengths), torch.tensor(keep)
    with turns:
        chosen, order = greedy(rule, x, member, lengths, keep, **tiles)
    check_x()
    check_member()
    assert chosen.dtype == torch.bool and chosen.is_contiguous()
    return chosen.cpu(), order.cpu()


def reference(rule, x, member, lengths, keep):
    return REFERENCES[rule](x, member, torch.tensor(lengths), torch.tensor(keep)).cpu()


def exact(rule, n, seed):
    """Features whose sums and distances have no rounding in fp32, and many ties; n a power of two for exact means."""
    make = torch.Generator().manual_seed(seed)
    if rule == "cosine":
        return torch.randint(0, 2, (n, 16), generator=make) * 2.0 - 1
    return torch.randint(-3, 4, (n, 5), generator=make).float()


def images_of(data, most=12):
    """Lengths, members and budgets; images of whose tokens a power of two are members."""
    members = data.draw(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3))
    lengths = [m + data.draw(st.integers(0, most - m)) for m in members]
    member = torch.cat(
        [
            torch.randperm(n, generator=torch.Generator().manual_seed(n + 7 * m)) < m
            for n, m in zip(lengths, members, strict=True)
        ]
    )
    return lengths, member, [data.draw(st.integers(0, n)) for n in lengths]


def assert_each_step_is_best(rule, x, member, chosen, order, keep, near=False):
    """The picks of one image, in order: each has the least potential of all that were left, up to what fp32 rounds.

    A sum of C squares of differences is off by at most C + 2 units relatively, its inverse by three more, and the sum
    of t of them by t more. A cosine is off by C units for the product and for each norm C / 2 + 3; twice as much for
    the product that a tensor core adds up. The mean is off by n + 1 units of the mean of |x|. Where rows are ``near``
    one another and distances come from products, 2 C + 8 units of the squares are up to 1 / NEAR times as many of the
    distance.
    """
    x, left = x.cpu().double(), member.clone()
    n, channels = int(member.sum()), x.shape[1]
    k = min(keep, n)
    assert int(chosen.sum()) == k and not (chosen & ~member).any()
    if k in (0, n):
        return
    picks = order[:k].tolist()
    assert chosen.nonzero()[:, 0].tolist() == sorted(picks)
    unit = x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)
    loose = 0.0
    if rule == "repulsion":
        d = x - x[member].mean(0)
        potential = d.square().sum(1)
        off = (n + 2) * UNIT * x[member].abs().mean(0)
        slack = (channels + 4) * UNIT * potential + (2 * d.abs() * off + off.square()).sum(1)
    else:
        cosines = (unit @ unit.T).fill_diagonal_(-torch.inf).masked_fill(~member, -torch.inf)
        potential, loose = cosines.amax(1), (4 * channels + 16) * UNIT
        slack = torch.full_like(potential, loose)
    total = (
        torch.zeros(len(x), dtype=torch.float64) if rule == "repulsion" else torch.full((len(x),), -torch.inf).double()
    )
    for t, pick in enumerate(picks):
        assert left[pick]
        best = (potential + slack)[left].min()
        assert potential[pick] - slack[pick] <= best, f"step {t}: {potential[pick]} but {best} is there"
        left[pick] = False
        if rule == "repulsion":
            total = total + 1 / ((x - x[pick]).square().sum(1) + sts.EPSILON)
            units = (2 * channels + 8) / NEAR.value if near else channels + 8
            slack = (units + t) * UNIT * total
        else:
            total = total.maximum(unit @ unit[pick])
            slack = torch.full_like(total, loose)
        potential = total


@given(RULES, DTYPES, TILES, st.integers(1, 22), st.integers(0, 9), st.integers(1, 33), st.integers(0, 99))
def test_each_step_takes_the_best(rule, dtype, tiles, n, k, channels, seed):
    make = torch.Generator().manual_seed(seed)
    x = (torch.randn(n, channels, generator=make) * 10.0 ** (seed % 5 - 2) + seed % 3).to(dtype)
    member = torch.rand(n, generator=make) < 0.9
    chosen, order = search(rule, x, member, [n], [k], seed, **tiles)
    assert_each_step_is_best(rule, x, member, chosen, order, k)


@pytest.mark.slow
@given(
    RULES,
    DTYPES,
    st.sampled_from([{"rows": 8}, {"rows": 16, "width": 3}, {"rows": 4, "width": 9}]),
    st.integers(30, 150),
    st.integers(2, 40),
    st.integers(1, 70),
    st.sampled_from([0.0, 1e-4, 1e-2, 0.1, 1.0]),
    st.integers(0, 99),
)
@settings(max_examples=max(4, settings.default.max_examples // 2))
def test_each_step_takes_the_best_where_rows_are_alike(rule, dtype, tiles, n, k, channels, spread, seed):
    """Clusters far from zero, more rows than a tile, and several passes."""
    make = torch.Generator().manual_seed(seed)
    centres = torch.randn(1 + seed % 7, channels, generator=make) + seed % 3
    x = centres[torch.randint(0, len(centres), (n,), generator=make)]
    x = (x + spread * torch.randn(n, channels, generator=make)).to(dtype)
    member = torch.rand(n, generator=make) < 0.9
    chosen, order = search(rule, x, member, [n], [k], seed, **tiles, ahead=16)
    assert_each_step_is_best(rule, x, member, chosen, order, k, near=True)


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(0, 50)), max_size=8), st.integers(1, 7))
def test_launches_hold_what_they_search(images, width):
    lengths, keep = [n for n, _ in images], [k for _, k in images]
    waves = sample._waves(lengths, keep, width)
    assert sum(waves) == len(images)
    for n in waves:
        share = sample._share(lengths[:n], keep[:n], 16, width, 128)
        assert share.group == 1 or share.programs <= width
        most = max((n for n, k in images if k), default=0)
        assert share.most <= max(sample.HELD + 16, -(-most // width) + 16)
        lengths, keep = lengths[n:], keep[n:]


def test_more_images_than_a_launch_takes(monkeypatch):
    monkeypatch.setattr(sample, "HELD", 4)
    x, lengths, keep = exact("repulsion", 32, 5), [8, 16, 2, 2, 4], [3, 5, 1, 2, 2]
    member = torch.ones(32, dtype=torch.bool)
    assert sample._waves(lengths, keep, 4) == [1, 1, 3]
    expected = [search("repulsion", *both, [n], [k]) for *both, n, k in zip(
        x.split(lengths), member.split(lengths), lengths, keep, strict=True)]  # fmt: skip
    chosen, order = search("repulsion", x, member, lengths, keep, rows=2, width=4)
    assert torch.equal(chosen, torch.cat([c for c, _ in expected]))
    found = order.split(keep)
    assert all(torch.equal(o, e) for o, (_, e), n, k in zip(found, expected, lengths, keep, strict=True) if k < n)


@given(RULES, DTYPES, TILES, st.data())
def test_is_the_reference_where_arithmetic_is_exact(rule, dtype, tiles, data):
    lengths, member, keep = images_of(data)
    x = exact(rule, len(member), data.draw(st.integers(0, 999))).to(dtype)
    chosen, _ = search(rule, x, member, lengths, keep, data.draw(st.integers(0, 999)), **tiles)
    assert torch.equal(chosen, reference(rule, x, member, lengths, keep))


@given(RULES, TILES, st.data())
@settings(max_examples=8)
def test_images_do_not_know_of_each_other_nor_of_their_order_nor_of_tokens_that_left(rule, tiles, data):
    lengths, member, keep = images_of(data)
    x = exact(rule, len(member), data.draw(st.integers(0, 999)))
    together = search(rule, x, member, lengths, keep, **tiles)[0].split(lengths)
    images = list(zip(x.split(lengths), member.split(lengths), keep, together, strict=True))
    for own, left, k, chosen in images:
        more = data.draw(st.integers(0, 5))
        own = torch.cat([own, torch.full((more, own.shape[1]), 2.0)])
        left = torch.cat([left, torch.zeros(more, dtype=torch.bool)])
        alone = search(rule, own, left, [len(own)], [k], **tiles)[0]
        assert torch.equal(alone, torch.cat([chosen, torch.zeros(more, dtype=torch.bool)]))
    images = [images[i] for i in data.draw(st.permutations(range(len(images))))]
    x, member, chosen = (torch.cat([image[i] for image in images]) for i in (0, 1, 3))
    again = search(rule, x, member, [len(image[0]) for image in images], [image[2] for image in images], **tiles)[0]
    assert torch.equal(again, chosen)


@given(DTYPES, TILES, st.sampled_from([-6, -1, 3]), st.integers(0, 99))
@settings(max_examples=10)
def test_cosines_do_not_depend_on_scale(dtype, tiles, power, seed):
    x = torch.randn(8, 9, generator=torch.Generator().manual_seed(seed)).to(dtype)
    x = torch.where(x.abs() < 2.0**-5, 0, x)  # or fp16 would round after scaling
    everything = torch.ones(8, dtype=torch.bool), [8], [3]
    order, scaled = (search("cosine", y, *everything, **tiles)[1] for y in (x, x * 2.0**power))
    assert torch.equal(order, scaled)


@given(st.integers(0, 2**32))
def test_any_order_of_programs_gives_the_same(seed):
    rule, rows = ("repulsion", "cosine")[seed % 2], 1 + seed % 3
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed % 7))
    asked = torch.ones(7, dtype=torch.bool), [4, 3], [3, 2]
    rows = {1: 1, 2: 2, 3: 4}[rows]
    expected = search(rule, x, *asked, rows=rows)[1]
    assert torch.equal(search(rule, x, *asked, seed, rows=rows, width=5)[1], expected)


@pytest.mark.parametrize("rule", REFERENCES)
def test_across_blocks_of_pairs_and_of_members(rule):
    """More tokens than a block of the first pick's kernels has, and than a block of members."""
    make = torch.Generator().manual_seed(0)
    x, member = torch.randn(1300, 7, generator=make), torch.rand(1300, generator=make) < 0.1
    member[:64] = True
    lengths, keep = [1100, 200], [3, 2]
    chosen, order = search(rule, x, member, lengths, keep)
    at = 0
    for i, (own, left, some) in enumerate(zip(*(y.split(lengths) for y in (x, member, chosen)), strict=True)):
        assert_each_step_is_best(rule, own, left, some, order[at:], keep[i])
        at += keep[i]


@pytest.mark.parametrize("tiles", [{}, {"rows": 2, "width": 4}], ids=str)
@pytest.mark.parametrize("rule", REFERENCES)
def test_strides(rule, tiles):
    x, member = exact(rule, 16, 3), torch.ones(16, dtype=torch.bool)
    expected = reference(rule, x, member, [16], [6])
    wide, many = torch.full((16, 3, x.shape[1]), 9.0), torch.zeros(16, 5, dtype=torch.bool)
    wide[:, 1], many[:, 2] = x, member
    for features in (x.T.contiguous().T, wide[:, 1], x[:1].expand(16, -1)):
        chosen = search(rule, features, many[:, 2], [16], [6], **tiles)[0]
        assert torch.equal(chosen, expected if features.stride(0) else torch.arange(16) < 6)


@pytest.mark.parametrize("tiles", [{}, {"rows": 2}, {"rows": 2, "width": 8}], ids=str)
@pytest.mark.parametrize("rule", REFERENCES)
def test_equal_tokens_in_order_and_zero_is_zero(rule, tiles):
    for x in (torch.zeros(6, 3), -torch.ones(6, 3), torch.tensor([[1.0], [0], [0], [-1], [0], [1]]).expand(-1, 16)):
        chosen = search(rule, x, torch.ones(6, dtype=torch.bool), [6], [3], **tiles)[0]
        assert torch.equal(chosen, reference(rule, x, torch.ones(6, dtype=torch.bool), [6], [3]))


@pytest.mark.parametrize("tiles", [{}, {"rows": 2}, {"rows": 2, "width": 8}], ids=str)
@pytest.mark.parametrize("rule", REFERENCES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number_ends(rule, tiles, value):
    x = exact(rule, 8, 0)
    x[2], x[5, 1] = value, value
    chosen, order = search(rule, x, torch.ones(8, dtype=torch.bool), [8], [4], **tiles)
    assert chosen.nonzero()[:, 0].tolist() == sorted(order.tolist())
    assert int(chosen.sum()) == 4


@pytest.mark.parametrize("rule", REFERENCES)
def test_nothing_to_choose_and_nothing_to_leave(rule):
    x, some = exact(rule, 8, 1), torch.tensor([1, 0, 0, 1, 1, 0, 0, 1], dtype=torch.bool)
    none = torch.zeros_like(some)
    assert search(rule, x[:0], none[:0], [], [])[0].shape == (0,)
    assert search(rule, x[:0], none[:0], [0, 0], [0, 3])[0].shape == (0,)
    for member, lengths, keep in ((some, [8], [0]), (none, [8], [3]), (none, [4, 0, 4], [4, 1, 4])):
        assert not search(rule, x, member, lengths, keep)[0].any()
    for keep in (4, 5, 8, 9, 2**40):
        for tiles in ({}, {"rows": 2}, {"rows": 2, "width": 4}):
            assert torch.equal(search(rule, x, some, [8], [keep], **tiles)[0], some)


def test_too_many_channels():
    with pytest.raises(ValueError, match="16385 channels; expected at most 16384"):
        search("repulsion", torch.zeros(1, 16385), torch.ones(1, dtype=torch.bool), [1], [1])


def test_float64_is_taken_in_fp32():
    x, member = exact("repulsion", 8, 2), torch.ones(8, dtype=torch.bool)
    assert torch.equal(
        search("repulsion", x.double(), member, [8], [3])[0], search("repulsion", x, member, [8], [3])[0]
    )


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(0, 50)), max_size=6),
    st.sampled_from([1, 2, 8]),
    st.integers(1, 12),
)
def test_programs_share_the_rows(images, rows, width):
    lengths, keep = [n for n, _ in images], [k for _, k in images]
    share = sample._share(lengths, keep, rows, width)
    fields = sample.FIELDS.value
    programs = [share.table[i * fields : (i + 1) * fields] for i in range(share.programs)]
    busy = [i for i, (n, k) in enumerate(images) if n and k]
    assert share.programs <= max(width, len(busy))
    assert share.group == 1 or share.programs <= width
    slots = set()
    for image, i in enumerate(busy):
        own = [p for p in programs if p[0] == image]
        assert [p[1:4] for p in own] == [[sum(lengths[:i]), lengths[i], min(lengths[i], keep[i])]] * len(own)
        assert [p[6:8] for p in own] == [[rank, len(own)] for rank in range(len(own))]
        assert [row for p in own for row in range(p[4], p[5])] == list(range(lengths[i]))
        assert all(p[4] < p[5] <= p[4] + share.tiles * rows for p in own)
        mine = set(range(own[0][8], own[0][8] + len(own) * own[0][3]))
        assert not slots & mine
        slots |= mine
    assert share.group == 1 or slots == set(range(share.slots))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["sts_sample", "divprune_sample"])
def test_opcheck(name, dtype):
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    member = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 1], dtype=torch.bool, device=DEVICE)
    args = x, member, torch.tensor([5, 0, 4]), torch.tensor([2, 0, 4])
    op = getattr(torch.ops.vlm_triton, name).default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    assert torch.equal(op(*args), getattr(torch.ops.vlm, name)(*args))


@triton.jit
def order_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, ordered(tl.load(x + i)))


def test_order_of_numbers():
    x = [-float("inf"), -2.0, -(2.0**-149), -0.0, 0.0, 2.0**-149, 1.0, 3e38, float("inf"), float("nan")]
    x = torch.tensor([*x, *x[:6]], device=DEVICE)
    out = torch.empty(16, dtype=torch.int32, device=DEVICE)
    order_kernel[(1,)](x, out, N=16)
    assert out[3] == out[4] == 0 and (out[[0, 1, 2, 4, 5, 6, 7, 8]].diff() > 0).all() and out[9] > out[8]


def test_epsilon_is_the_reference_s():
    assert sample.EPSILON.value == sts.EPSILON
