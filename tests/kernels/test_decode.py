"""Attention of a few queries against a cache, its keys split among programs, against its reference in fp64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmrewrite.kernels import decode as kernels
from vlmrewrite.kernels import launch
from vlmrewrite.ops import positional
from vlmrewrite.testing.triton.interpreter import guarded

OP = torch.ops.vlm_triton.decode_attention.default
U32 = torch.finfo(torch.float32).eps / 2


def randn(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache(b, heads, m, d, dtype, layout, seed):
    """A view of a larger buffer: [B, Hk, m, D]."""
    if layout == "by token":
        return randn(b, m + 5, heads, d, dtype=dtype, seed=seed).transpose(1, 2)[:, :, :m]
    if layout == "by channel":
        return randn(b, heads, d, m + 3, dtype=dtype, seed=seed).transpose(2, 3)[:, :, :m]
    return randn(b, heads, m + 9, d, dtype=dtype, seed=seed)[:, :, :m]


def slots(b, m, holes, seed=0):
    """Logical positions that grow, some slots empty, more tokens dropped from later rows: int32 [B, m]."""
    made = torch.arange(m, dtype=torch.int32) + torch.arange(b, dtype=torch.int32)[:, None] * 3
    return made.masked_fill(torch.rand(b, m, generator=torch.Generator().manual_seed(seed)) < holes, -1)


@st.composite
def calls(draw):
    b, heads, group, n = (draw(st.integers(1, most)) for most in (2, 2, 7, 4))
    m = draw(st.sampled_from([1, 17, 128, 129, 300]))
    d, dv = draw(st.sampled_from([(8, 8), (64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (48, 16), (16, 80)]))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    layout = draw(st.sampled_from(["by head", "by token", "by channel"]))
    keys = slots(b, m, draw(st.sampled_from([0.0, 0.3, 0.97, 1.0])), m)
    last = keys.amax(1, keepdim=True).clamp(min=0)
    queries = (last - n + 1 + torch.arange(n)).clamp(min=-1).to(torch.int32)
    options = {
        "scale": draw(st.sampled_from([None, 0.2])),
        "softcap": draw(st.sampled_from([None, 5.0])),
        "window": draw(st.sampled_from([None, 1, 40])),
    }
    q = randn(b, n, heads * group, d, dtype=dtype).transpose(1, 2)
    k, v = cache(b, heads, m, d, dtype, layout, 1), cache(b, heads, m, dv, dtype, layout, 2)
    return (q, k, v, queries, keys), options


def close(got, args, options):
    """Within what rounding explains: of each weight and result in the dtype; of scores and sums in fp32, worst case."""
    q, k, v, queries, keys = (x.double() if x.is_floating_point() else x for x in args)
    expected = positional.decode_attention(q, k, v, queries, keys, **options)
    spread = positional.decode_attention(q, k, v.abs(), queries, keys, **options)
    info, (d, m) = torch.finfo(got.dtype), (k.shape[3], k.shape[2])
    unit = 0 if got.dtype == torch.float32 else info.eps / 2
    scale = d**-0.5 if options.get("scale") is None else options["scale"]
    largest = (q.abs().amax((2, 3)).max() * k.abs().amax((2, 3)).max()) * d * scale
    scores = (d + 8) * U32 * largest + 8 * U32 * (options.get("softcap") or 0.0)
    bound = spread * (2 * unit + U32 * (m + 16) + 2 * scores) + m * info.smallest_normal * info.eps * v.abs().max()
    assert got.dtype == args[0].dtype and got.shape == expected.shape and got.is_contiguous()
    assert ((got.cpu().double() - expected).abs() <= bound).all()
    assert not got.cpu()[~spread.any(-1)].any()  # elsewhere a sum of rounded weights may cancel to zero


@given(calls())
def test_against_the_reference(device, drawn):
    args, options = drawn
    views, checks = zip(*(guarded(x.to(device)) for x in args), strict=True)
    close(kernels.decode_attention(*views, **options), args, options)
    for check in checks:
        check()


@pytest.mark.parametrize("window", [1, 7, 64])
def test_each_query_has_a_window_of_its_own(device, window):
    keys = slots(2, 150, 0.0)
    args = [randn(2, 4, 3, 16), randn(2, 2, 150, 16, seed=1), randn(2, 2, 150, 16, seed=2), keys[:, -3:], keys]
    close(kernels.decode_attention(*(x.to(device) for x in args), window=window), args, {"window": window})


@pytest.mark.parametrize("m", [40, 700])
@pytest.mark.parametrize("d", [80, 128])
def test_nothing_is_written_beside_the_outputs(monkeypatch, device, m, d):
    checks = []

    def empty(*shape, dtype, device):
        view, check = guarded(torch.zeros(*shape, dtype=dtype, device=device))
        checks.append(check)
        return view

    args = [randn(2, 6, 3, d), randn(2, 2, m, d), randn(2, 2, m, d), torch.full((2, 3), m, dtype=torch.int32)]
    args = [x.to(device) for x in (*args, slots(2, m, 0.1))]
    monkeypatch.setattr(kernels, "torch", SimpleNamespace(empty=empty, float32=torch.float32))
    out = kernels.decode_attention(*args)
    assert len(checks) == (1 if m == 40 else 3)
    for check in checks:
        check()
    close(out, [x.cpu() for x in args], {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_splits(monkeypatch, device, dtype):
    m, found = 900, []
    args = [randn(1, 2, 2, 64, dtype=dtype), *(randn(1, 1, m, 64, dtype=dtype, seed=s) for s in (1, 2))]
    args = [*args, torch.tensor([[m, m + 1]], dtype=torch.int32), slots(1, m, 0.2)]
    for n in (1, 2, 7):
        length = -(-m // (n * 128)) * 128
        monkeypatch.setattr(kernels, "splits", lambda *_, length=length: (-(-m // length), length))
        found.append(kernels.decode_attention(*(x.to(device) for x in args)))
        close(found[-1], args, {})


def test_a_batch_is_its_rows_and_slots_have_no_order(device):
    q, k, v = randn(3, 6, 2, 32), randn(3, 2, 300, 32, seed=1), randn(3, 2, 300, 32, seed=2)
    keys, queries = slots(3, 300, 0.2), torch.tensor([[280, 299], [5, 6], [-1, 150]], dtype=torch.int32)
    args = [x.to(device) for x in (q, k, v, queries, keys)]
    all_rows = kernels.decode_attention(*args)
    for i in range(3):
        one = kernels.decode_attention(*(x[i : i + 1] for x in args))
        torch.testing.assert_close(one, all_rows[i : i + 1], atol=1e-6, rtol=1e-5)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(device)
    q, k, v, queries, keys = args
    mixed = kernels.decode_attention(q, k[:, :, order], v[:, :, order], queries, keys[:, order])
    torch.testing.assert_close(mixed, all_rows, atol=1e-6, rtol=1e-5)
    heads = torch.tensor([1, 0], device=device)
    q = q.view(3, 2, 3, 2, 32)[:, heads].flatten(1, 2)
    swapped = kernels.decode_attention(q, k[:, heads], v[:, heads], queries, keys)
    torch.testing.assert_close(swapped.view(3, 2, 2, 3, 32)[:, :, heads].flatten(2, 3), all_rows, atol=0, rtol=0)


@pytest.mark.parametrize("window", [None, 30])
def test_padding_changes_nothing(device, window):
    q, k, v = randn(2, 2, 1, 32), randn(2, 2, 200, 32, seed=1), randn(2, 2, 200, 32, seed=2)
    keys, queries = slots(2, 200, 0.0), torch.tensor([[199], [202]], dtype=torch.int32)
    plain = kernels.decode_attention(*(x.to(device) for x in (q, k, v, queries, keys)), window=window)
    left, right = 150, 333
    k, v = (torch.nn.functional.pad(x, (0, 0, left, right), value=1e4) for x in (k, v))
    keys = torch.nn.functional.pad(keys, (left, right), value=-1)
    padded = kernels.decode_attention(*(x.to(device) for x in (q, k, v, queries, keys)), window=window)
    torch.testing.assert_close(padded, plain, atol=1e-6, rtol=1e-5)


def test_what_is_behind_nothing_visible_is_not_read(device):
    q, k, v = randn(2, 2, 1, 32), randn(2, 2, 128, 32, seed=1), randn(2, 2, 128, 32, seed=2)
    keys = torch.full((2, 128), -1, dtype=torch.int32)
    keys[:, 50:60] = torch.arange(10)
    k[:, :, :50], v[:, :, :50], k[:, :, 60:], v[:, :, 60:] = (float("nan"),) * 4
    args = [x.to(device) for x in (q, k, v, torch.tensor([[9], [4]], dtype=torch.int32), keys)]
    assert kernels.decode_attention(*args).isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 1, 5), (2, 4, 0, 5), (2, 4, 1, 0), (1, 4, 2, 300)])
def test_rows_that_see_nothing(device, shape):
    b, heads, n, m = shape
    q, k = randn(b, heads, n, 16).to(device), randn(b, 2, m, 16).to(device)
    nowhere = torch.full((b, m), -1, dtype=torch.int32, device=device)
    out = kernels.decode_attention(q, k, k, torch.zeros(b, n, dtype=torch.int32, device=device), nowhere)
    assert out.shape == (b, n, heads, 16) and not out.any()


def test_a_cache_of_more_elements_than_an_int32_counts(device):
    memory = torch.empty(2**31 + 2**10, dtype=torch.float16, device=device)  # most of it is never touched
    near, m = randn(1, 1, 5, 16, dtype=torch.float16), 5
    k = memory.as_strided((1, 1, m, 16), (0, 0, 2**29, 1))
    k.copy_(near)
    q, at = near[:, :, :1].to(device), torch.arange(m, dtype=torch.int32, device=device)[None]
    got = kernels.decode_attention(q, k, k, at[:, -1:], at)
    near = near.to(device)
    assert torch.equal(got, kernels.decode_attention(q, near, near, at[:, -1:], at))


@given(st.integers(1, 300), st.integers(1, 131072), st.integers(1, 112), st.integers(1, 128))
def test_splits_cover_the_keys(programs, keys, rows, most):
    n, length = kernels.splits(programs, keys, rows, torch.device("cpu"), most)
    assert length % 128 == 0 and (n - 1) * length < keys <= n * length
    assert n <= max(1, most) and n * length // max(1, n) >= min(keys, 128)


def test_splits_fill_the_processors():
    cpu = torch.device("cpu")
    assert kernels.splits(8 * 32, 4096, 1, cpu)[0] == 1
    for programs, keys in ((4, 16384), (32, 4096), (8, 131072)):
        assert programs * kernels.splits(programs, keys, 7, cpu)[0] >= launch.DEFAULT_PROCESSORS


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("namespace", [torch.ops.vlm, torch.ops.vlm_triton], ids=["reference", "kernel"])
def test_operator(device, namespace):
    at = torch.arange(5, dtype=torch.int32, device=device).expand(2, -1).contiguous()
    q, k, v = (randn(2, h, n, 8).to(device) for h, n in ((4, 2), (2, 5), (2, 5)))
    for x in (q, k, v):
        x.requires_grad_(namespace is torch.ops.vlm_triton)
    options = {"scale": 0.3, "softcap": 3.0, "window": 2}
    torch.library.opcheck(namespace.decode_attention.default, (q, k, v, at[:, 3:].contiguous(), at), options)


def test_gradients(device):
    at = torch.arange(5, dtype=torch.int32, device=device)[None]
    q, k, v = (randn(1, h, n, 8, seed=n).to(device).requires_grad_() for h, n in ((4, 2), (2, 5), (2, 5)))
    grads = []
    for f in (OP, positional.decode_attention):
        out = f(q, k, v, at[:, 3:], at, window=3)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_flops_are_counted(device):
    from torch.utils.flop_counter import FlopCounterMode

    q, k = torch.randn(2, 4, 1, 8, device=device), torch.randn(2, 2, 5, 8, device=device)
    at = torch.zeros(2, 5, dtype=torch.int32, device=device)
    with FlopCounterMode(display=False) as counter:
        OP(q, k, k, at[:, :1], at)
    assert counter.get_total_flops() == 2 * 2 * 4 * 5 * (8 + 8)
