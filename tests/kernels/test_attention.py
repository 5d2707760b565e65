"""Attention by logical position: its ranges, the kernel against fp64, and laws that hold whatever the numbers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmrewrite.kernels import attention as kernels
from vlmrewrite.ops import positional
from vlmrewrite.ops.attention import attention
from vlmrewrite.ops.device import interpreted
from vlmrewrite.testing.triton.interpreter import config, guarded

OP = torch.ops.vlm_triton.positional_attention.default
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def chance(*shape, p=0.5, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < p


def hides(mask):
    return 0 if mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 2


def seen_by(mask, q_pos, k_pos, window):
    """Which key each query sees, one at a time: bool [B, n, m]."""
    seen = torch.zeros(*q_pos.shape, k_pos.shape[1], dtype=torch.bool)
    for b, row in enumerate(q_pos.tolist()):
        for i, q in enumerate(row):
            for j, k in enumerate(k_pos[b].tolist()):
                if mask is not None and mask.dim() == 4:
                    row = max(0, q - (mask.shape[3] - mask.shape[2]))
                    seen[b, i, j] = q >= 0 and k >= 0 and bool(mask[b % len(mask), 0, row, k] > hides(mask))
                    continue
                seen[b, i, j] = 0 <= k <= q and (window is None or k > q - window)
                if seen[b, i, j] and mask is not None:
                    seen[b, i, j] = bool(mask[b % len(mask), k])
    return seen


@st.composite
def positions(draw, batch, n, m):
    """Queries that are the last of the positions and keys that are all or some of them, with empty slots."""
    span = max(n, m) + draw(st.integers(0, 9))
    q_pos, k_pos = torch.full((batch, n), -1), torch.full((batch, m), -1)
    seed, gaps = draw(st.integers(0, 99)), draw(st.sampled_from([0.0, 0.0, 0.1, 0.5]))
    for b in range(batch):
        order = torch.randperm(span, generator=torch.Generator().manual_seed(seed + b))
        q_pos[b], k_pos[b] = torch.arange(span - n, span), order[:m].sort().values
    if draw(st.integers(0, 9)) == 0:
        k_pos = k_pos.flip(1)
    q_pos[chance(batch, n, p=gaps, seed=seed)], k_pos[chance(batch, m, p=gaps, seed=seed + 1)] = -1, -1
    return q_pos, k_pos, span


@st.composite
def sets(draw):
    batch, n, m = draw(st.integers(1, 2)), draw(st.integers(0, 140)), draw(st.integers(0, 200))
    q_pos, k_pos, span = draw(positions(batch, n, m))
    kind, mask = draw(st.sampled_from(["none", "left", "random", "integers", "full", "additive"])), None
    if kind in ("full", "additive"):
        p, shape = draw(st.sampled_from([0.5, 0.001, 0.9999])), (draw(st.sampled_from([1, batch])), 1, span, span)
        causal = torch.arange(span) <= torch.arange(span)[:, None] - draw(st.sampled_from([-9, 0]))
        mask = chance(*shape, p=p) if draw(st.booleans()) else causal.expand(shape)
        mask = mask if kind == "full" else torch.zeros(shape).masked_fill(~mask, float("-inf"))
    elif kind != "none":
        mask = torch.arange(span)[None] >= draw(st.integers(0, span)) if kind == "left" else chance(batch, span, p=0.9)
    return mask.long() if kind == "integers" else mask, q_pos, k_pos, draw(st.sampled_from([None, 1, 30, 100]))


@given(sets())
def test_ranges(drawn):
    mask, q_pos, k_pos, window = drawn
    queries, keys, blocks = positional.attention_blocks(mask, q_pos, k_pos, window)
    assert [x.dtype for x in (queries, keys, blocks)] == [torch.int32] * 3
    assert torch.equal(queries, q_pos.int()) and blocks.shape == (len(q_pos), -(-q_pos.shape[1] // 64), 4)
    seen, m = seen_by(mask, q_pos, k_pos, window), k_pos.shape[1]
    by_bits = mask is not None and mask.dim() == 2
    hidden = torch.zeros_like(k_pos, dtype=torch.bool) if not by_bits else mask.expand(len(k_pos), -1).gather(
        1, k_pos.clamp(min=0)) == 0  # fmt: skip
    assert torch.equal(keys, torch.where(hidden, -1, k_pos).int())
    for b, rows in enumerate(blocks.tolist()):
        for i, (first, end, full_first, full_end) in enumerate(rows):
            mine = seen[b, 64 * i : 64 * i + 64]
            assert 0 <= first <= full_first <= full_end <= end <= m
            assert not mine[:, :first].any() and not mine[:, end:].any()
            assert mine[q_pos[b, 64 * i : 64 * i + 64] >= 0, full_first:full_end].all()
            assert (full_end - full_first) % 64 == 0
            if (window is None or (mask is not None and not by_bits)) and mine.any():  # nothing is read in vain
                assert mine[:, first : first + 64].any() and mine[:, 64 * ((end - 1) // 64) :].any()
            if not (q_pos[b, 64 * i : 64 * i + 64] >= 0).any():
                assert first == end


def test_most_of_plain_causal_needs_no_mask():
    at = torch.arange(1000)[None]
    blocks = positional.attention_blocks(None, at, at)[2][0]
    assert blocks[:3].tolist() == [[0, 64, 0, 0], [0, 128, 0, 64], [0, 192, 0, 128]]
    assert blocks[15].tolist() == [0, 1000, 0, 960]
    blocks = positional.attention_blocks(None, at, at, 256)[2][0]
    assert blocks[10].tolist() == [384, 704, 448, 640]
    full = torch.ones(1, 1, 1000, 1000, dtype=torch.bool)
    assert positional.attention_blocks(full, at, at)[2][0, 3].tolist() == [0, 1000, 0, 960]
    of_a_window = full.tril() & ~full.tril(-256)
    assert torch.equal(positional.attention_blocks(of_a_window, at, at)[2][0], blocks)


@st.composite
def calls(draw):
    """q, k, v, queries, keys, blocks, full, scale, softcap, window."""
    dtype = draw(st.sampled_from(DTYPES))
    batch, key_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    n, m = draw(st.integers(0, 140)), draw(st.integers(0, 200))
    d, dv = (draw(st.sampled_from([8, 24, 64, 80, 96, 128, 256])) for _ in range(2))
    dv = draw(st.sampled_from([d, dv]))
    q_pos, k_pos, span = draw(positions(batch, n, m))
    kind, mask = draw(st.sampled_from(["none", "padding", "full", "additive"])), None
    shape = draw(st.sampled_from([1, batch])), 1, draw(st.sampled_from([span, max(n, 1)])), span
    if kind == "padding":
        mask = chance(batch, span, p=0.8)
    elif kind == "full":
        mask = chance(*shape)
    elif kind == "additive":
        hides = draw(st.sampled_from([torch.finfo(dtype).min, torch.finfo(dtype).min * 0.75, float("-inf")]))
        mask = numbers(*shape, dtype=dtype).masked_fill(chance(*shape), hides)
    window = draw(st.sampled_from([None, None, 40]))
    sizes = (batch, key_heads * group, n, d), (batch, key_heads, m, d), (batch, key_heads, m, dv)
    xs = [numbers(*size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    layout = draw(st.sampled_from(["dense", "tokens first", "wide", "transposed"]))
    if layout == "tokens first":
        xs = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in xs]
    elif layout == "wide":
        xs = [F.pad(x, (3, 5))[..., 3:-5] for x in xs]
    elif layout == "transposed":
        xs = [x.mT.contiguous().mT for x in xs]
    ranges = positional.attention_blocks(mask, q_pos, k_pos, window)
    full = mask if kind in ("full", "additive") else None
    scale, softcap = draw(st.sampled_from([None, None, 0.3, -0.2, 0.0])), draw(st.sampled_from([None, None, 2.0]))
    return (*xs, *ranges, full, scale, softcap, window)


def exact(q, k, v, queries, keys, blocks, full=None, scale=None, softcap=None, window=None):
    """The reference in fp64, and how far from it the kernel may be.

    A score is a sum of D products whose error grows with the norms of its factors; in fp32 they are three TF32 products
    each, which leave 2^-21. An error of it is a relative error of the weight, once more in the sum of the weights.
    Weights and results are rounded to the dtype, and sums of m weights in fp32.
    """
    bias = full.double() if full is not None and full.is_floating_point() else full
    if full is not None and bias is not full:  # of its own dtype, whose least number hides
        bias = bias.masked_fill(full < torch.finfo(full.dtype).min / 2, float("-inf"))
    wide = [x.double() for x in (q, k, v)]
    expected = positional.positional_attention(*wide, queries, keys, blocks, bias, scale, softcap, window)
    if not expected.numel() or not v.numel():
        return expected, 0.0
    scale = abs(q.shape[-1] ** -0.5 if scale is None else scale)
    largest = scale * float(wide[0].norm(dim=-1).max() * wide[1].norm(dim=-1).max())
    least = 2.0**-24
    score = largest * (q.shape[-1] * least + (2.0**-21 if q.dtype == torch.float32 else 0)) + 8 * least * (1 + largest)
    score += 0 if softcap is None else 8 * least * softcap
    score += 0 if full is None or full.dtype == torch.bool else 8 * least * 6  # of a bias of at most 6
    rounding = torch.finfo(q.dtype).eps * 1.1 + least * v.shape[2] + (2.0**-21 if q.dtype == torch.float32 else 0)
    return expected, float(v.abs().max()) * (2 * score + rounding) + torch.finfo(q.dtype).tiny


def close(got, args):
    expected, most = exact(*args)
    assert got.shape == expected.shape and got.dtype == args[0].dtype and got.is_contiguous()
    assert got.numel() == 0 or float((got.double() - expected).abs().max()) <= most
    blind = (expected == 0).all(3).all(2)
    assert not got[blind].any()


def on(device, args):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in args]


@given(calls(), st.integers(0, 3))
def test_kernel_is_its_reference(device, args, choice):
    args = on(device, args)
    views, checks = zip(*(guarded(x) for x in args[:6]), strict=True)
    with config(choice):
        got = kernels.positional_attention(*views, *args[6:])
    close(got, args)
    for check in checks:
        check()


@settings(max_examples=8)
@given(calls())
def test_reference_is_attention_of_the_dialect(args):
    q, k, v, queries, keys, blocks, full, scale, softcap, _ = args
    got = positional.positional_attention(q, k, v, queries, keys, blocks, full, scale, softcap)
    expected = attention(q, k, v, full, queries.long(), keys.long(), scale, False, softcap)
    _, most = exact(*args[:9])
    clear = expected.isfinite().all(3).all(2) & (got != 0).any(3).any(2)
    assert not clear.any() or float((got - expected)[clear].abs().max()) <= 4 * most


def call(batch=2, heads=4, key_heads=2, n=70, m=150, d=32, dtype=torch.float32, mask=None, window=None, device="cpu"):
    sizes = (batch, heads, n, d), (batch, key_heads, m, d), (batch, key_heads, m, d)
    xs = [numbers(*size, dtype=dtype, seed=i) for i, size in enumerate(sizes)]
    k_pos = torch.arange(m).expand(batch, -1)
    return on(device, [*xs, *positional.attention_blocks(mask, k_pos[:, m - n :], k_pos, window)])


@pytest.mark.parametrize(("n", "m"), [(1, 1), (64, 64), (130, 130), (5, 200), (128, 128)])
def test_plain_causal_is_sdpa(device, n, m):
    args = call(n=n, m=m, device=device)
    seen = torch.ones(n, m, dtype=torch.bool, device=device).tril(m - n)
    expected = F.scaled_dot_product_attention(*args[:3], attn_mask=seen, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(kernels.positional_attention(*args), expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("choice", range(4))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ranges_that_are_no_multiple_of_a_tile(device, dtype, choice):
    q_pos, k_pos, mask = torch.arange(130, 330)[None], torch.arange(330)[None], torch.arange(330)[None] >= 10
    q_pos = q_pos.masked_fill(torch.arange(200) % 50 == 7, -1)
    ranges = positional.attention_blocks(mask, q_pos, k_pos)
    assert ranges[2][0, :2].tolist() == [[0, 256, 64, 128], [0, 320, 64, 192]]
    xs = [numbers(1, 1, n, 32, dtype=dtype, seed=i) for i, n in enumerate((200, 330, 330))]
    args = on(device, [*xs, *ranges])
    with config(choice):
        close(kernels.positional_attention(*args), args)


def test_nothing_is_written_beside_the_output(monkeypatch, device):
    checks, new = [], torch.Tensor.new_empty

    def guard(self, *shape, **kwargs):
        if kwargs:  # of the interpreter
            return new(self, *shape, **kwargs)
        view, check = guarded(new(self, *shape).zero_())
        checks.append(check)
        return view

    args = call(d=24, device=device)
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "new_empty", guard)
        got = kernels.positional_attention(*args)
    assert len(checks) == 1
    checks[0]()
    close(got, args)


@pytest.mark.parametrize(("n", "m"), [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("run", [kernels.positional_attention, positional.positional_attention])
def test_no_queries_or_no_keys(device, run, n, m):
    xs = [torch.randn(2, 2, size, 16, device=device) for size in (n, m, m)]
    at = [torch.arange(size, device=device).expand(2, -1) for size in (n, m)]
    got = run(*xs, *positional.attention_blocks(None, *at))
    assert got.shape == (2, n, 2, 16) and not got.any()


def test_hidden_keys_and_empty_slots_change_nothing(device):
    q, k, v, queries, keys, _ = call(batch=1)
    where_q, where_k = torch.arange(70) * 2 + 1, torch.arange(150) + torch.arange(150) // 10
    wide = [numbers(1, 4, 141, 32, seed=8), *(numbers(1, 2, 165, 32, seed=8 + i) for i in (1, 2))]
    for x, w, at in zip((q, k, v), wide, (where_q, where_k, where_k), strict=True):
        w[:, :, at] = x
    q_pos, k_pos = torch.full((1, 141), -1), torch.full((1, 165), -1)
    q_pos[:, where_q], k_pos[:, where_k] = queries.long(), keys.long()
    k_pos[:, 10] = 150  # one that is there, but padded
    mask = torch.arange(151)[None] < 150
    args = on(device, [*wide, *positional.attention_blocks(mask, q_pos, k_pos)])
    got = kernels.positional_attention(*args)
    expected = kernels.positional_attention(*call(batch=1, device=device))
    _, most = exact(*call(batch=1))
    assert float((got[:, where_q] - expected).abs().max()) <= 2 * most
    assert not got[:, where_q - 1].any()


def test_batch_and_heads_are_independent(device):
    mask = chance(3, 150, p=0.7)
    q, k, v, queries, keys, blocks = call(batch=3, mask=mask, device=device)
    got = kernels.positional_attention(q, k, v, queries, keys, blocks)
    order, heads = [2, 0, 1], [3, 2, 1, 0]
    permuted = (q[order][:, heads], *(x[order].flip(1) for x in (k, v)), queries[order], keys[order], blocks[order])
    assert torch.equal(kernels.positional_attention(*permuted), got[order][:, :, heads])
    for i in range(3):
        one = (x[i : i + 1] for x in (q, k, v, queries, keys, blocks))
        assert torch.equal(kernels.positional_attention(*one), got[i : i + 1])


def test_a_window_that_holds_everything_is_none(device):
    args = call(device=device)
    got = kernels.positional_attention(*args, None, None, None, 150)
    torch.testing.assert_close(got, kernels.positional_attention(*args), atol=2e-6, rtol=2e-6)


def test_a_full_mask_that_is_causal_changes_nothing(device):
    at = torch.arange(150)
    mask = (at <= at[:, None])[None, None]
    q, k, v, queries, keys, _ = call(heads=2, key_heads=1, device=device)
    blocks = positional.attention_blocks(mask, queries.cpu(), keys.cpu())[2].to(device)
    expected = kernels.positional_attention(*call(heads=2, key_heads=1, device=device))
    for full in (mask, torch.zeros(1, 1, 150, 150).masked_fill(~mask, float("-inf"))):
        got = kernels.positional_attention(q, k, v, queries, keys, blocks, full.to(device))
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not interpreted(), reason="touches two pages of a large tensor, which a GPU would have to hold")
def test_keys_that_are_far_apart(device):
    q, k, _, *ranges = call(batch=1, heads=1, key_heads=1, n=2, m=3, d=16, dtype=torch.bfloat16)
    memory = torch.empty(2**32, dtype=torch.bfloat16)  # 8 GB that the system does not hand out until they are written
    far = memory.as_strided(k.shape, (0, 0, 2**31 - 2**20, 1))
    far.copy_(k)
    got = kernels.positional_attention(q, far, far, *ranges)
    assert torch.equal(got, kernels.positional_attention(q, k, k, *ranges))


def test_shapes_stay_one_autotuning_key(device):
    names = kernels.attention_forward_kernel.keys
    assert names == ["bucket", "D", "DV"]


def test_operator(device):
    args = call(batch=1, heads=2, key_heads=1, n=9, m=12, d=16, device=device)
    torch.library.opcheck(OP, tuple(args))
    mask = torch.zeros(1, 1, 12, 12, device=device)
    torch.library.opcheck(OP, (*args, mask, 0.2, 3.0))
    q_pos, k_pos = args[3].long(), args[4].long()
    torch.library.opcheck(torch.ops.vlm.attention_blocks.default, (None, q_pos, k_pos))


@pytest.mark.parametrize("masked", ["padding", "full", "additive"])
def test_gradients(device, masked):
    mask = {"padding": torch.arange(12)[None] >= 5, "full": chance(1, 1, 12, 12)}.get(masked, numbers(1, 1, 12, 12))
    xs = [numbers(1, h, n, 8, seed=i).to(device) for i, (h, n) in enumerate([(2, 9), (1, 12), (1, 12)])]
    at = torch.arange(12)[None]
    ranges = on(device, positional.attention_blocks(mask, at[:, 3:], at))
    full = None if masked == "padding" else mask.to(device)
    weight = numbers(1, 9, 2, 8, seed=5).to(device)

    def gradients(op, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in xs]
        bias = full.to(dtype) if masked == "additive" else full
        return torch.autograd.grad((op(*leaves, *ranges, bias) * weight).sum(), leaves)

    for got, expected in zip(gradients(OP, torch.float32), gradients(written_out, torch.float64), strict=True):
        torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def written_out(q, k, v, queries, keys, blocks, full):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    seen = (keys[:, None] >= 0) & (keys[:, None] <= queries[:, :, None])
    if full is not None:
        rows = full[:, 0, queries[0].long()]
        scores, seen = (scores, rows) if full.dtype == torch.bool else (scores + rows[:, None], torch.ones_like(seen))
    weights = scores.masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    return (weights.masked_fill(~seen.any(2)[:, None, :, None], 0) @ v).transpose(1, 2)
