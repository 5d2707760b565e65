"""Rows of several tensors in one launch, and rows written over a copy, against their references."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vlmrewrite.kernels import gather as kernels
from vlmrewrite.ops import selection
from vlmrewrite.ops.selection import restore
from vlmrewrite.testing.triton.interpreter import guarded

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
]
OPS = torch.ops.vlm_triton


def numbers(shape, dtype, seed=0):
    made = torch.randint(0, 255, shape, generator=torch.Generator().manual_seed(seed))
    return made > 127 if dtype == torch.bool else made.to(dtype)


def index_of(batch, length, n, seed=0):
    """Ascending, each token at most once."""
    order = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed)).argsort(1)
    return order[:, :n].sort(1).values


def scattered(draw, x):
    """The same numbers, laid out otherwise."""
    kind = draw(st.sampled_from(["dense", "transposed", "padded", "shifted", "reversed axes"]))
    if kind == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "reversed axes":
        order = list(range(x.dim()))[::-1]
        return x.permute(order).contiguous().permute(order)
    if kind == "dense":
        return x
    wide = x.new_zeros(*x.shape[:-1], x.shape[-1] + 3)
    at = slice(0, -3) if kind == "padded" else slice(3, None)
    wide[..., at] = x
    return wide[..., at]


@st.composite
def selections(draw):
    """Tensors, where their tokens are, and the index of a set."""
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    n = draw(st.integers(0, length))
    xs, dims = [], []
    for i in range(draw(st.integers(1, 8))):
        before, behind = (draw(st.lists(st.integers(1, 4), max_size=1 + j)) for j in range(2))
        behind = [*behind, draw(st.sampled_from([1, 5, 8, 16, 80]))] if behind or draw(st.booleans()) else behind
        shape = (draw(st.sampled_from([1, batch])), *before, length, *behind)
        xs.append(scattered(draw, numbers(shape, draw(st.sampled_from(DTYPES)), i)))
        dims.append(1 + len(before) - draw(st.sampled_from([0, len(shape)])))
    return xs, dims, index_of(batch, length, n)


def same(got, expected):
    assert got.shape == expected.shape and got.dtype == expected.dtype and got.is_contiguous()
    assert torch.equal(got.cpu(), expected.cpu())


def test_numbers_that_are_conjugate_or_negative_by_a_bit(device):
    x, index = torch.randn(2, 9, 4, dtype=torch.complex64).to(device), index_of(2, 9, 3).to(device)
    views = [x.conj(), x.conj().imag]
    for got, view in zip(kernels.gather(views, [1, 1], index), views, strict=True):
        same(got, selection.select(view, index).resolve_conj().resolve_neg())


@given(selections())
def test_gather_is_its_reference(device, drawn):
    xs, dims, index = drawn
    views, checks = zip(*(guarded(x.to(device)) for x in xs), strict=True)
    got = kernels.gather(list(views), dims, guarded(index.to(device))[0])
    for g, e in zip(got, selection.gather(xs, dims, index), strict=True):
        same(g, e)
    for check in checks:
        check()


def outside(monkeypatch):
    """Outputs amid memory that may not be written; returns the checks."""
    checks, new, like = [], torch.Tensor.new_empty, torch.empty_like

    def guard(x):
        view, check = guarded(x.zero_())
        checks.append(check)
        return view

    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *a, **kw: new(x, *a, **kw) if kw else guard(new(x, *a)))
    monkeypatch.setattr(torch, "empty_like", lambda x, **kw: guard(like(x, **kw)))
    return checks


@pytest.mark.parametrize("channels", [1, 7, 64, 1100])
def test_nothing_is_written_beside_the_outputs(monkeypatch, device, channels):
    x, index = numbers((2, 19, channels), torch.float16).to(device), index_of(2, 19, 7).to(device)
    checks = outside(monkeypatch)
    kernels.gather([x, x[:, :, 0], x[:, None]], [1, 1, 2], index)
    kernels.restore(x, x[:, :7], index, index % 2 == 0)
    assert len(checks) == 4
    for check in checks:
        check()


@st.composite
def restorations(draw):
    batch, length = draw(st.integers(1, 3)), draw(st.sampled_from([1, 5, 33, 150, 300]))
    n, channels = draw(st.integers(0, length)), draw(st.sampled_from([1, 6, 8, 40]))
    dtype = draw(st.sampled_from(DTYPES))
    full = scattered(draw, numbers((batch, length, channels), dtype))
    part = scattered(draw, numbers((batch, n, channels), dtype, 1))
    valid = torch.rand(batch, n, generator=torch.Generator().manual_seed(n)) < draw(st.sampled_from([0.0, 0.6, 1.0]))
    return full, part, index_of(batch, length, n), valid


@given(restorations())
def test_restore_is_its_reference(device, drawn):
    views, checks = zip(*(guarded(x.to(device)) for x in drawn), strict=True)
    same(kernels.restore(*views), restore(*drawn))
    for check in checks:
        check()


def test_a_search_of_three_steps(monkeypatch, device):
    monkeypatch.setattr(kernels, "FAN", 16)
    length = 700
    full, part = torch.zeros(1, length, 1), torch.arange(1.0, length)[None, :, None]
    index = torch.arange(1, length)[None]
    valid = torch.ones_like(index, dtype=torch.bool)
    args = [x.to(device) for x in (full, part, index, valid)]
    same(kernels.restore(*args), restore(full, part, index, valid))


def test_restore_undoes_gather(device):
    x, index = numbers((2, 50, 24), torch.bfloat16).to(device), index_of(2, 50, 20).to(device)
    part = kernels.gather([x], [1], index)[0]
    same(kernels.restore(x, part, index, torch.ones_like(index, dtype=torch.bool)), x)
    everything = index_of(2, 50, 50).to(device)
    same(kernels.gather([x], [1], everything)[0], x)
    zeros = kernels.restore(torch.zeros_like(x), part, index, torch.ones_like(index, dtype=torch.bool))
    same(kernels.gather([zeros], [1], index)[0], part)


def test_a_batch_is_its_rows(device):
    x, index = numbers((3, 30, 24), torch.float32).to(device), index_of(3, 30, 11).to(device)
    valid = (torch.rand(3, 11) < 0.7).to(device)
    part = x[:, :11] + 1
    both = kernels.gather([x], [1], index)[0], kernels.restore(x, part, index, valid)
    for i in range(3):
        one = slice(i, i + 1)
        same(kernels.gather([x[one]], [1], index[one])[0], both[0][one])
        same(kernels.restore(x[one], part[one], index[one], valid[one]), both[1][one])


def test_seven_tensors_take_two_launches(monkeypatch, device):
    launched = []
    monkeypatch.setattr(kernels, "_launch", lambda slots, index: launched.append(len(slots)))
    x = torch.zeros(2, 9, 4, device=device)
    kernels.gather([x] * 7, [1] * 7, index_of(2, 9, 3).to(device))
    assert launched == [6, 1]


def test_a_long_tensor_is_addressed_with_64_bits(device):
    rows, length, channels = 1, 9, 4
    far = torch.empty(1, dtype=torch.int8, device="meta").expand(rows, length, channels)
    strided = torch.empty(0, device="meta").as_strided((1, length, channels), (1, 2**29, 1))
    assert kernels._merged(far, 1) == (0, 0) and kernels._merged(strided, 1) == (0, 1)
    assert kernels._slot(strided, strided.new_empty(1, 3, 4), 1, (0, 1), 3)[7] == 2**29 * 4 // 16


@pytest.mark.parametrize("make", [lambda: torch.zeros(3, 9, 4), lambda: torch.zeros(9, 2)])
def test_a_batch_that_does_not_fit(device, make):
    x = make().to(device)
    with pytest.raises(ValueError, match=r"^selecting from .* expected tokens behind a batch of 1 or 2$"):
        kernels.gather([x], [1 if x.dim() == 3 else 0], index_of(2, 9, 3).to(device))


def test_dtypes_that_differ(device):
    zeros, index = torch.zeros(2, 9, 4, device=device), index_of(2, 9, 9).to(device)
    with pytest.raises(ValueError, match=r"^restoring rows of torch.float16 to torch.float32; expected one dtype$"):
        kernels.restore(zeros, zeros.half(), index, index >= 0)


def test_operators(device):
    torch.manual_seed(0)
    x = torch.randn(2, 9, 4, device=device, requires_grad=True)
    table, index = torch.randn(1, 9, 6, device=device), index_of(2, 9, 3).to(device)
    valid = torch.tensor([[True, False, True], [True, True, True]], device=device)
    part = torch.randn(2, 3, 4, device=device, requires_grad=True)
    torch.library.opcheck(OPS.gather.default, ([x, table, index_of(2, 9, 9).to(device)], [1, 1, 1], index))
    torch.library.opcheck(OPS.restore.default, (x, part, index, valid))
    torch.library.opcheck(OPS.restore.default, (x.mT.contiguous().mT, part, index, valid))


def test_gradients(device):
    torch.manual_seed(0)
    x = torch.randn(1, 4, 2, device=device, dtype=torch.float64, requires_grad=True)
    index, valid = index_of(1, 4, 2).to(device), torch.tensor([[True, False]], device=device)
    part = torch.randn(1, 2, 2, device=device, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: OPS.gather([x, x * 2], [1, 1], index), (x,))
    assert torch.autograd.gradcheck(lambda x, part: OPS.restore(x, part, index, valid), (x, part))
