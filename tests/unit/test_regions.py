"""Regions of a token grid, against loops over rectangles."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmrewrite.hf import grids
from vlmrewrite.passes.dape import matching, regions
from vlmrewrite.passes.dape.regions import SCALES


def rectangle(at, rows, columns, scale):
    """The locations of the block of a scale that holds location ``at``, row-major."""
    r, c = at // columns // scale * scale, at % columns // scale * scale
    return [i * columns + j for i in range(r, min(r + scale, rows)) for j in range(c, min(c + scale, columns))]


@st.composite
def images(draw, most=9):
    grid = draw(st.lists(st.tuples(st.integers(1, most), st.integers(1, most)), min_size=1, max_size=3))
    grid = torch.tensor(grid)
    return grid, grid.prod(1)


@st.composite
def covers(draw):
    """Grids, lengths, a cover and how much it has more than the coarsest."""
    grid, lengths = draw(images())
    seed = draw(st.integers(0, 999))
    base = regions.coarsest(lengths, grid, lengths.tolist())
    spare = [int((~part).sum()) for part in base.split(lengths.tolist())]
    more = [draw(st.integers(0, n)) for n in spare]
    priority = torch.rand(3, len(base), generator=torch.Generator().manual_seed(seed))
    return grid, lengths, base | regions.refined(base, lengths, grid, priority, more), more


@given(images())
def test_a_representative_is_nearest_to_the_centre_and_that_of_a_smaller_block(drawn):
    grid, lengths = drawn
    found, start = regions.representatives(lengths, grid), 0
    for rows, columns in grid.tolist():
        for f in range(rows * columns):
            for s, scale in enumerate(SCALES):
                inside = rectangle(f, rows, columns, scale)
                centre = [sum(x) / len(inside) for x in zip(*(divmod(i, columns) for i in inside), strict=True)]
                away = {i: max(abs(a - b) for a, b in zip(divmod(i, columns), centre, strict=True)) for i in inside}
                rep = int(found[s, start + f]) - start
                assert away[rep] == min(away.values()) <= 0.5
                assert s == 0 or rep in (int(x) - start for x in found[s - 1, [start + i for i in inside]])
        start += rows * columns


def test_representatives_of_one_image():
    found = regions.representatives(torch.tensor([30]), torch.tensor([[5, 6]]))
    assert found[2].unique().tolist() == [7, 11, 25, 29]
    assert found[1].unique().tolist() == [7, 9, 11, 19, 21, 23, 25, 27, 29]


@given(covers())
def test_every_location_is_covered_once_inside_its_block(drawn):
    grid, lengths, member, more = drawn
    owner, level = regions.region_owner(member, lengths, grid)
    base, start = regions.coarsest(lengths, grid, lengths.tolist()), 0
    assert member[owner].all() and (owner[member] == member.nonzero()[:, 0]).all()
    for (rows, columns), extra in zip(grid.tolist(), more, strict=True):
        part = slice(start, start + rows * columns)
        assert int(member[part].sum()) == int(base[part].sum()) + extra
        for token in member[part].nonzero()[:, 0].tolist():
            region = (owner[part] == start + token).nonzero()[:, 0].tolist()
            smallest = next(s for s, n in enumerate(SCALES) if set(region) <= set(rectangle(token, rows, columns, n)))
            assert smallest == level[start + token] and token in region
        start += rows * columns


@given(covers(), st.data())
def test_a_refined_region_stays_inside_the_old_one(drawn, data):
    grid, lengths, member, _ = drawn
    more = [data.draw(st.integers(0, int((~part).sum()))) for part in member.split(lengths.tolist())]
    added = regions.refined(member, lengths, grid, torch.rand(3, len(member)), more)
    assert not (added & member).any()
    assert [int(part.sum()) for part in added.split(lengths.tolist())] == more
    old, _ = regions.region_owner(member, lengths, grid)
    new, _ = regions.region_owner(member | added, lengths, grid)
    assert torch.equal(old[new], old)


def naive(rows, columns, priority, k):
    """Greedy splitting of rectangles, each a (scale, locations), from 4 x 4 on; the last split may be partial."""
    rep = regions.representatives(torch.tensor([rows * columns]), torch.tensor([[rows, columns]]))
    whole = {tuple(rectangle(f, rows, columns, 4)) for f in range(rows * columns)}
    # At the border a 4 x 4 block may be no more than one of 2 x 2, and is one then.
    found = [(1 if block == tuple(rectangle(block[0], rows, columns, 2)) else 2, block) for block in whole]
    extra = 0
    while extra < k:
        can = [(s, block) for s, block in found if len(block) > 1]
        s, block = max(can, key=lambda x: (priority[x[0]][rep[x[0], x[1][0]]], x[0], -int(rep[x[0], x[1][0]])))
        found.remove((s, block))
        small = {tuple(rectangle(f, rows, columns, SCALES[s - 1])) for f in block}
        if len(small) - 1 <= k - extra:
            found += [(s - 1, b) for b in small]
            extra += len(small) - 1
            continue
        own = rep[s, block[0]]
        others = [(-priority[s - 1][rep[s - 1, b[0]]], int(rep[s - 1, b[0]]), b) for b in small if own not in b]
        others = [b for *_, b in sorted(others)]
        taken = others[: k - extra]
        left = tuple(i for b in small if b not in taken for i in b)
        return {frozenset(b) for _, b in found} | {frozenset(b) for b in taken} | {frozenset(left)}
    return {frozenset(b) for _, b in found}


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3, 10, 2**20]), st.data())
def test_a_cover_is_that_of_greedy_splitting(rows, columns, values, data):
    n = rows * columns
    grid, lengths = torch.tensor([[rows, columns]]), torch.tensor([n])
    base = regions.coarsest(lengths, grid, [n])
    k = data.draw(st.integers(0, int((~base).sum())))
    priority = torch.randint(0, values, (3, n), generator=torch.Generator().manual_seed(k)).float()
    member = base | regions.refined(base, lengths, grid, priority, [k])
    owner, _ = regions.region_owner(member, lengths, grid)
    got = {frozenset((owner == token).nonzero()[:, 0].tolist()) for token in owner.unique()}
    assert got == naive(rows, columns, priority.tolist(), k)


def test_ties_go_to_the_larger_block_and_then_to_the_first():
    grid, lengths = torch.tensor([[4, 8]]), torch.tensor([32])
    base = regions.coarsest(lengths, grid, [32])
    added = regions.refined(base, lengths, grid, torch.zeros(3, 32), [7])
    assert base.nonzero()[:, 0].tolist() == [9, 13]
    assert added.nonzero()[:, 0].tolist() == [0, 11, 15, 25, 27, 29, 31]


@given(covers(), st.integers(1, 5), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_averages_and_densities(drawn, channels, dtype):
    grid, lengths, member, _ = drawn
    owner, _ = regions.region_owner(member, lengths, grid)
    x = torch.randn(len(member), channels).to(dtype)
    mean, count = regions.pool(x, owner)
    dense, away = regions.density(x, owner), regions.deviation(x, owner)
    assert mean.dtype == count.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for token in range(len(member)):
        inside = x[owner == token].double()
        assert count[token] == len(inside)
        if len(inside):
            torch.testing.assert_close(mean[token].double(), inside.mean(0), rtol=1e-5, atol=1e-6)
            variance = (inside - inside.mean(0)).square().mean()
            torch.testing.assert_close(dense[token].double(), variance, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(away[owner == token].double().mean(), variance, rtol=1e-4, atol=1e-6)
        else:
            assert not mean[token].any() and dense[token] == 0


def test_a_region_of_one_location_is_what_it_was():
    x = torch.randn(6, 4)
    assert torch.equal(regions.pool(x, torch.arange(6))[0], x)
    assert not regions.density(x, torch.arange(6)).any()


def test_a_budget_that_the_grid_cannot_meet():
    lengths, grid = torch.tensor([16, 30]), torch.tensor([[4, 4], [5, 6]])
    assert int(regions.coarsest(lengths, grid, [1, 4]).sum()) == 5
    with pytest.raises(
        ValueError,
        match="^a budget of 3 tokens cannot cover an image of 5 x 6 tokens with regions of at most 4 x 4; expected at"
        " least 4$",
    ):
        regions.coarsest(lengths, grid, [1, 3])


def test_a_grid_that_does_not_fit():
    with pytest.raises(ValueError, match=r"^the grids \[\[4, 4\]\] do not account for images of \[15\] tokens$"):
        regions.representatives(torch.tensor([15]), torch.tensor([[4, 4]]))


def test_the_grid_of_an_image_that_is_wider_than_high():
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2))
    assert grids(config, [6, 4], torch.tensor([[1, 4, 6], [1, 8, 2]])).tolist() == [[2, 3], [4, 1]]


# ---- matches


def norm(x):
    x = x - x.mean()
    return x / (x.square().mean() + 1e-5).sqrt()


def weights_of(hidden, size=6):
    shapes = [(size, hidden), (size, hidden), (hidden,), (1,), (3,), (3,), (1,)]
    return [torch.randn(shape) for shape in shapes]


@pytest.mark.parametrize("learned", [False, True])
def test_match_by_loops(learned):
    torch.manual_seed(0)
    text, areas, level, visual = torch.randn(5, 8), torch.randn(7, 8), torch.arange(7) % 3, torch.rand(7)
    weights = weights_of(8) if learned else []
    rho, z = matching.match(text, areas, level, visual, weights)
    for i in range(5):
        t, row = norm(text[i]), []
        if learned:
            query, key, dense, bias, scale, slope, seen = weights
            r_i = 1 / (1 + math.exp(-float(dense @ t + bias)))
        for j in range(7):
            r = norm(areas[j])
            if learned:
                more = scale[level[j]] + slope[level[j]] * r_i + seen[0] * visual[j]
                row.append(float((query @ t) @ (key @ r) / 6**0.5 + more))
            else:
                row.append(float(t @ r) / 8**0.5)
        if not learned:
            total = sum(map(math.exp, row))
            p = [math.exp(x) / total for x in row]
            r_i = 1 + sum(x * math.log(x) for x in p) / math.log(7)
        assert z[i].tolist() == pytest.approx(row, abs=1e-5)
        assert float(rho[i]) == pytest.approx(r_i, abs=1e-5)


def test_counts_and_sizes_of_what_is_matched_vary_over_tokens():
    torch.manual_seed(1)
    level = torch.arange(40) % 3
    rho, z = matching.match(torch.randn(30, 16), torch.randn(40, 16), level, torch.rand(40))
    a = matching.aligned(rho, z, 8)
    counts = (a > 0).sum(1)
    assert len(counts.unique()) > 2 and counts.min() >= 1 and counts.max() <= 8
    assert len({tuple(sorted(set(level[row > 0].tolist()))) for row in a}) > 2
    torch.testing.assert_close(a.sum(1), torch.ones(30))
    for i, row in enumerate(a):
        scaled = (z[i] - z[i].min()) / (z[i].max() - z[i].min())
        expected = [j for j in scaled.argsort(descending=True)[:8].tolist() if scaled[j] >= 0.9 - 0.3 * rho[i]]
        assert sorted(expected) == row.nonzero()[:, 0].tolist()


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([0, 1, 4]), st.booleans())
def test_gains_of_images_together_are_those_of_each(rows, columns, text, learned):
    torch.manual_seed(rows + 10 * columns)
    grid, n = torch.tensor([[rows, columns]]), rows * columns
    blocks, weights = regions.representatives(torch.tensor([n]), grid), weights_of(8) if learned else []
    x, words = torch.randn(3, n, 8), torch.randn(3, text, 8)
    each = [matching.gains(one, blocks, own, weights) for one, own in zip(x, words, strict=True)]
    torch.testing.assert_close(matching.gains(x, blocks, words, weights), torch.stack(each))


def test_gains_of_rows_with_more_or_less_text():
    torch.manual_seed(2)
    grid, lengths = torch.tensor([[4, 6], [3, 3], [4, 6], [4, 6]]), torch.tensor([24, 9, 24, 24])
    features, stream, prompt = torch.randn(81, 8), torch.randn(3, 60, 8), torch.zeros(3, 60, dtype=torch.bool)
    prompt[0, 50:], prompt[1, 55:], prompt[2, 50:] = True, True, True
    flat = torch.cat([torch.arange(33), 60 + torch.arange(24), 120 + torch.arange(24)])
    got = matching.all_gains(features, stream, prompt, flat, lengths, grid)
    start = 0
    for n, size, row in zip(lengths.tolist(), grid, (0, 0, 1, 2), strict=True):
        blocks = regions.representatives(torch.tensor([n]), size[None])
        own = matching.gains(features[start : start + n], blocks, stream[row][prompt[row]])
        torch.testing.assert_close(got[:, start : start + n], own)
        start += n


@given(images(), st.integers(1, 5), st.sampled_from([torch.float32, torch.float64]))
def test_moments_of_blocks_are_those_of_their_locations(drawn, channels, dtype):
    grid, lengths = drawn
    blocks = regions.representatives(lengths, grid)
    x = torch.randn(blocks.shape[1], channels, dtype=dtype)
    found = regions.moments(x, blocks)
    torch.testing.assert_close(found.error[0], regions.deviation(x, blocks[1]))
    for s in (1, 2):
        mean, count = regions.pool(x, blocks[s])
        assert found.at[s - 1].tolist() == blocks[s].unique().tolist()
        torch.testing.assert_close(found.mean[s - 1], mean[found.at[s - 1]])
        torch.testing.assert_close(found.density[s], regions.density(x, blocks[s]))
        torch.testing.assert_close(found.error[s], regions.density(x, blocks[s]) * count)


def test_a_denser_token_has_as_many_regions_or_more():
    z = torch.rand(1, 50).expand(5, -1)
    counts = (matching.aligned(torch.linspace(0, 1, 5), z, 50) > 0).sum(1)
    assert (counts.diff() >= 0).all() and counts[0] < counts[-1]


def test_a_token_that_matches_all_regions_alike_has_none():
    assert not matching.aligned(torch.ones(2), torch.full((2, 5), 3.0), 5).any()


def test_operator():
    member = torch.ones(30, dtype=torch.bool)
    args = (member, torch.tensor([30]), torch.tensor([[5, 6]]))
    torch.library.opcheck(torch.ops.vlm.region_owner.default, args)
