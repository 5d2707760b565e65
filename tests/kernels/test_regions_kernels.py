"""Kernels for regions of token grids, against their references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.grids import Batch, covers, spare
from vlmrewrite.passes.dape import ops as dape
from vlmrewrite.passes.dape import regions
from vlmrewrite.passes.dape.kernels import detail, matching, quadtree
from vlmrewrite.passes.dape.kernels import regions as kernels
from vlmrewrite.passes.dape.matching import gains
from vlmrewrite.testing.triton.interpreter import guarded

OPS = torch.ops.vlm_triton
FEW = settings(max_examples=max(4, settings.default.max_examples // 3))
HALF = settings(max_examples=max(4, settings.default.max_examples // 2))
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def exact(x):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in x]


def no_worse(got, known, true, factor=2.0):
    """The kernel is about as far from the truth as the reference in the same dtype is, and no farther."""
    eps = torch.finfo(got.dtype).eps
    allowed = factor * float((known.double() - true.double()).abs().max()) + 4 * eps * float(true.abs().max())
    assert got.dtype == known.dtype and got.is_contiguous()
    assert float((got.double() - true.double()).abs().max()) <= allowed


# ---- owners and averages


@given(covers(), st.booleans())
def test_region_owner(device, drawn, added):
    grid, lengths, member = drawn
    if added:  # a set that is no cover: the tokens that were added to one
        member = member & ~regions.coarsest(lengths, grid, lengths.tolist())
    view, check = guarded(member.to(device))
    assert torch.equal(kernels.region_owner(view, lengths, grid).cpu(), regions.region_owner(member, lengths, grid))
    check()


@given(covers(), FLOATS, st.sampled_from([1, 21, 150]), st.booleans())
def test_averages(device, drawn, dtype, channels, strided):
    batch = Batch(drawn, device, dtype, channels)
    if strided:
        batch.stream = batch.stream.mT.contiguous().mT
    args = batch.pool()
    views, checks = zip(*(guarded(x) for x in args[:5]), strict=True)
    true = dape.dape_pool(*exact(args))
    no_worse(kernels.dape_pool(*views, *args[5:]), dape.dape_pool(*args), true)
    for check in checks:
        check()


def test_averages_in_double(device):
    batch = Batch((torch.tensor([[5, 6]]), torch.tensor([30]), torch.arange(30) % 3 == 1), device, torch.float64)
    torch.testing.assert_close(kernels.dape_pool(*batch.pool()), dape.dape_pool(*batch.pool()))


def test_no_tokens(device):
    cover = torch.tensor([[4, 4]]), torch.tensor([16]), torch.ones(16, dtype=torch.bool)
    batch = Batch(cover, device)
    none = batch.hidden[:, :0], batch.index[:, :0], batch.valid[:, :0]
    assert kernels.dape_pool(*none, *batch.pool()[3:]).shape == (2, 0, 21)
    images = torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)
    got = kernels.dape_pool(batch.hidden, batch.index, batch.valid & False, batch.stream, batch.flat[:0], *images)
    assert torch.equal(got, batch.hidden)
    assert kernels.region_owner(batch.member[:0], *images).shape == (2, 0)
    assert not len(matching.dape_cover(batch.features[:0], batch.stream, batch.prompt, batch.flat[:0], images[1],
                                       batch.member[:0], images[0], images[0]))  # fmt: skip


def test_a_grid_that_does_not_fit(device):
    member = torch.ones(15, dtype=torch.bool, device=device)
    with pytest.raises(ValueError, match=r"^the grids \[\[4, 4\]\] do not account for images of \[15\] tokens$"):
        kernels.region_owner(member, torch.tensor([15]), torch.tensor([[4, 4]]))


# ---- splits


@HALF
@given(covers(images=2), st.data())
def test_splits_are_those_of_the_queue(device, drawn, data):
    grid, lengths, member = drawn
    base = regions.coarsest(lengths, grid, lengths.tolist())
    ties, seed = data.draw(st.sampled_from([1, 3, 6, 10**6])), data.draw(st.integers(0, 99))
    priority = torch.randint(-ties, ties, (3, len(base)), generator=torch.Generator().manual_seed(seed)).float()
    priority[:, :: data.draw(st.integers(3, 9))] = data.draw(st.sampled_from([0.0, -0.0, float("nan"), float("inf")]))
    for cover in (None, member):
        start = base if cover is None else cover
        more = [data.draw(st.integers(0, n)) for n in spare(start, lengths)]
        expected = regions.refined(start, lengths, grid, priority, more)
        images, blocks = kernels.table(lengths, grid, torch.device(device), more)
        given = None if cover is None else guarded(cover.to(device))[0]
        got = quadtree.refined(images, blocks, guarded(priority.to(device))[0], given)
        assert torch.equal(got.cpu(), expected if cover is not None else base | expected)


def at_blocks(x, lengths, grid):
    """What stands at the representatives of each scale."""
    return [x[s, found.unique()] for s, found in enumerate(regions.representatives(lengths, grid).to(x.device))]


def priorities(attention, features, cover, lengths, grid):
    blocks = regions.representatives(lengths, grid).to(features.device)
    found = [regions.deviation(features, blocks[1]), *(regions.density(features, b) for b in blocks[1:])]
    return torch.stack(found) * attention[regions.owners(cover, blocks)]


@HALF
@given(covers(), FLOATS)
def test_what_a_split_goes_by(device, drawn, dtype):
    b = Batch(drawn, device, dtype, 70)
    images, blocks = kernels.table(b.lengths, b.grid, b.member.device)
    got = quadtree.moments(images, blocks, b.features, b.member, b.attention)[0]
    known = priorities(b.attention, b.features, b.member, b.lengths, b.grid)
    true = priorities(b.attention.double(), b.features.double(), b.member, b.lengths, b.grid)
    for g, k, t in zip(*(at_blocks(x, b.lengths, b.grid) for x in (got, known, true)), strict=True):
        no_worse(g, k, t, 4.0)


@FEW
@given(covers(images=2), st.data())
def test_split(device, drawn, data):
    b = Batch(drawn, device)
    keep = torch.tensor([data.draw(st.integers(0, n)) for n in spare(b.member, b.lengths)])
    args = (b.attention, b.features, b.grid, ~b.member, b.lengths, keep)
    got = quadtree.dape_split(*args)
    assert torch.equal(got, dape.dape_split(*args))


# ---- matches


def expected_gains(b, weights):
    blocks, found, start = regions.representatives(b.lengths, b.grid).to(b.features.device), [], 0
    for n in b.lengths.tolist():
        here, row = slice(start, start + n), int(b.flat[start]) // b.prompt.shape[1]
        text = b.stream[row][b.prompt[row]]
        found.append(gains(b.features[here], blocks[:, here] - start, text, weights))
        start += n
    return torch.cat(found, 1)


@FEW
@given(covers(9, 2), FLOATS, st.booleans(), st.sampled_from([0, 3, 33]), st.integers(0, 9))
def test_gains(device, drawn, dtype, learned, text, seed):
    b = Batch(drawn, device, dtype, 40, text, seed)
    b.features += 1
    weights = b.matching if learned else []
    images, blocks = kernels.table(b.lengths, b.grid, b.member.device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "SPACE", 1 << 10)  # the text in parts
        least = int(b.lengths.min())
        got = matching.gains(images, blocks, b.features, b.stream, b.prompt, b.flat, least, weights)
    expected = expected_gains(b, weights)
    for g, e in zip(*(at_blocks(x, b.lengths, b.grid) for x in (got, expected)), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@FEW
@given(covers(6, 2), st.booleans(), st.data())
def test_cover(device, drawn, learned, data):
    b = Batch(drawn, device)
    keep = [data.draw(st.integers(-(-r // 4) * -(-c // 4), r * c)) for r, c in b.grid.tolist()]
    args = b.cover(keep, *(b.matching if learned else []))
    assert torch.equal(matching.dape_cover(*args), dape.dape_cover(*args))


@pytest.mark.slow
def test_a_batch_is_its_images(device):
    """Images, their text with them, one by one."""
    grid = torch.tensor([[6, 7], [4, 5]])
    b = Batch((grid, grid.prod(1), torch.ones(62, dtype=torch.bool)), device, text=4)
    whole = matching.dape_cover(*b.cover([20, 9]))
    for i, (here, keep) in enumerate(((slice(0, 42), 20), (slice(42, 62), 9))):
        row = int(b.flat[here.start]) // b.prompt.shape[1]
        one = slice(row, row + 1)
        args = (b.features[here], b.stream[one], b.prompt[one], b.flat[here] - row * b.prompt.shape[1])
        sizes = (grid[i : i + 1], b.member[here], grid.prod(1)[i : i + 1], torch.tensor([keep]))
        assert torch.equal(matching.dape_cover(*args, *sizes), whole[here])


def test_a_budget_that_a_grid_cannot_meet(device):
    b = Batch((torch.tensor([[5, 6]]), torch.tensor([30]), torch.ones(30, dtype=torch.bool)), device)
    with pytest.raises(ValueError, match="^a budget of 3 tokens cannot cover an image of 5 x 6 tokens .* at least 4$"):
        matching.dape_cover(*b.cover([3]))


# ---- detail


@HALF
@given(covers(9, 2), FLOATS, st.sampled_from([0.0, 0.25, 0.3, 0.5, 1.0]), st.booleans())
def test_detail(device, drawn, dtype, share, strided):
    b = Batch(drawn, device, dtype)
    if strided:
        b.hidden, b.features = b.hidden.mT.contiguous().mT, b.features.T.contiguous().T
    args = b.inject(share)
    got, known = detail.dape_inject(*args), dape.dape_inject(*args)
    assert torch.equal((got != b.hidden).any(2), (known != b.hidden).any(2))
    wide = [x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]
    no_worse(got, known, dape.dape_inject(*wide), 3.0)


@pytest.mark.parametrize(("share", "chosen"), [(0.1, 0), (0.25, 1), (0.3, 2), (0.5, 2), (0.7, 4), (1.0, 5)])
def test_the_focus_is_rounded_half_to_even_and_ties_go_to_the_first(device, share, chosen):
    grid, lengths = torch.tensor([[4, 20]]), torch.tensor([80])
    b = Batch((grid, lengths, regions.coarsest(lengths, grid, [80])), device)
    b.features, b.attention = b.features[:4].repeat_interleave(20, 0), torch.ones_like(b.attention)
    args = b.inject(share)
    changed = (detail.dape_inject(*args) != b.hidden).any(2)
    assert torch.equal(changed, (dape.dape_inject(*args) != b.hidden).any(2))
    assert changed.any(0).tolist() == [i < chosen for i in range(5)]


# ---- operators


@pytest.mark.slow
def test_operators(device):
    grid, lengths = torch.tensor([[4, 5], [3, 3]]), torch.tensor([20, 9])
    base = regions.coarsest(lengths, grid, [20, 9])
    cover = base | regions.refined(base, lengths, grid, torch.rand(3, 29), [4, 2])
    b = Batch((grid, lengths, cover), device)
    b.hidden.requires_grad_()
    skip = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(OPS.region_owner.default, (b.member, lengths, grid))
    torch.library.opcheck(OPS.dape_pool.default, b.pool(), test_utils=skip)
    torch.library.opcheck(OPS.dape_inject.default, b.inject(0.5), test_utils=skip)
    torch.library.opcheck(OPS.dape_cover.default, b.cover([9, 3]), test_utils=skip[:2])
    keep = torch.tensor([2, 1])
    torch.library.opcheck(
        OPS.dape_split.default, (b.attention, b.features, grid, ~b.member, lengths, keep), test_utils=skip[:2]
    )


def test_gradients_are_those_of_the_references(device):
    b = Batch((torch.tensor([[4, 5]]), torch.tensor([20]), torch.arange(20) % 3 == 1), device)
    for run, known, args in (
        (OPS.dape_pool, dape.dape_pool, (*b.pool(), b.prompt, *b.matching)),
        (OPS.dape_inject, dape.dape_inject, b.inject(0.5)),
    ):
        wanted = [x.requires_grad_() for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
        found = []
        for f in (run, known):
            loss = (f(*args) * torch.linspace(-1, 1, 21, device=device)).sum()
            found.append(torch.autograd.grad(loss, wanted, allow_unused=True))
        for x, y in zip(*found, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
