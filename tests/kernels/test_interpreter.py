"""The interpreter that the other tests of kernels run in agrees with torch, and notices what compiled code would do."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmrewrite.ops.device import interpreted
from vlmrewrite.testing.triton.interleaving import interleaved
from vlmrewrite.testing.triton.interpreter import config, guarded, trustworthy

pytestmark = pytest.mark.skipif(not interpreted(), reason="needs TRITON_INTERPRET=1")


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    m, k = tl.arange(0, M), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * M + m[None, :])
    out = tl.dot(a, b, input_precision=PRECISION)
    tl.store(out_ptr + m[:, None] * M + m[None, :], out.to(out_ptr.dtype.element_ty))


@triton.jit
def elementwise_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + N + i, a - b)
    tl.store(out_ptr + 2 * N + i, a * b)
    tl.store(out_ptr + 3 * N + i, tl.where(a > b, -a, tl.maximum(a, b) * 0.5))
    tl.store(out_ptr + 4 * N + i, (a < b).to(tl.bfloat16))
    tl.store(out_ptr + 5 * N + i, tl.exp2(a.to(tl.float32)))
    tl.store(out_ptr + 6 * N + i, (i * 3).to(tl.bfloat16))
    tl.store(out_ptr + 7 * N + i, a.to(tl.float16).to(tl.float32) + b.to(tl.float32))


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def reduce_kernel(x_ptr, out_ptr, index_ptr, scan_ptr, M: tl.constexpr, N: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(out_ptr + m, tl.sum(x, 1))
    tl.store(out_ptr + M + m, tl.sum(x.to(tl.float32), 1))
    value, index = tl.max(x, 1, return_indices=True)
    tl.store(out_ptr + 2 * M + m, value)
    tl.store(out_ptr + 3 * M + m, tl.min(x, 1))
    tl.store(index_ptr + m, index)
    tl.store(index_ptr + M + m, tl.argmin(x, 1))
    tl.store(scan_ptr + m[:, None] * N + n[None, :], tl.associative_scan(x, 1, add))


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, stride, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + i * stride, tl.load(x_ptr + i * stride, mask=i < n + 1), mask=i < n + 1)


@triton.jit
def overflow_kernel(out_ptr, n):
    tl.store(out_ptr, n * n)


@triton.jit
def and_kernel(out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, i, mask=(i < n) and (i > 1))


@triton.jit
def assert_kernel(out_ptr, n):
    tl.device_assert(n > 2, "n is too small")
    tl.store(out_ptr, n)


@triton.autotune([triton.Config({"BLOCK": 16}), triton.Config({"BLOCK": 32})], key=["n"], reset_to_zero=["out_ptr"])
@triton.jit
def tuned_kernel(out_ptr, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        tl.atomic_add(out_ptr, BLOCK + start * 0)


@triton.jit
def relay_kernel(barrier_ptr, x_ptr, out_ptr, rounds, arrivals, BARRIER: tl.constexpr):
    """Each program adds up what all wrote, several times over, with a barrier between writing and reading."""
    i, n = tl.program_id(0), tl.num_programs(0)
    for r in range(rounds):
        tl.store(x_ptr + r * n + i, tl.load(out_ptr + i) + 1)
        if BARRIER:
            tl.atomic_add(barrier_ptr, 1, sem="acq_rel")
            while tl.atomic_add(barrier_ptr, 0, sem="acquire") < (r + 1) * arrivals:
                pass
        total = 0
        for j in range(n):
            total += tl.load(x_ptr + r * n + j)
        tl.store(out_ptr + i, total)


@triton.jit
def lock_kernel(lock_ptr, count_ptr, LOCK: tl.constexpr):
    if LOCK:
        while tl.atomic_cas(lock_ptr, 0, 1) == 1:
            pass
    count = tl.load(count_ptr)
    tl.store(count_ptr, count + 1)
    if LOCK:
        tl.atomic_xchg(lock_ptr, 0)


def bf16(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_trustworthy_twice_is_once() -> None:
    before = triton.runtime.interpreter.InterpreterBuilder.binary_op
    trustworthy()
    assert triton.runtime.interpreter.InterpreterBuilder.binary_op is before


def test_bf16_dot() -> None:
    a, b, out = bf16(16, 32), bf16(32, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    dot_kernel[(1,)](a, b, out, M=16, K=32, PRECISION="ieee")
    torch.testing.assert_close(out, (a.double() @ b.double()).bfloat16(), rtol=2**-8, atol=0)


def test_a_dot_rounds_to_tf32_unless_told_otherwise() -> None:
    a, b, out = torch.full((16, 16), 1 + 2**-12), torch.eye(16), torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, M=16, K=16, PRECISION=None)
    assert (out == 1).all()
    dot_kernel[(1,)](a, b, out, M=16, K=16, PRECISION="ieee")
    assert (out == a).all()


def test_a_dot_refuses_an_inner_size_that_the_compiler_refuses() -> None:
    with pytest.raises(Exception, match="K >= 16"):
        dot_kernel[(1,)](bf16(16, 8), bf16(8, 16), bf16(16, 16), M=16, K=8, PRECISION="ieee")


def test_bf16_arithmetic_and_casts() -> None:
    a, b, n = bf16(64), bf16(64).flip(0), 64
    a[0], b[1], a[2] = float("inf"), float("nan"), -0.0
    out = torch.empty(8, n, dtype=torch.bfloat16)
    elementwise_kernel[(1,)](a, b, out, N=n)
    expected = [
        a + b,
        a - b,
        a * b,
        torch.where(a > b, -a, torch.fmax(a, b) * 0.5),
        a < b,
        torch.exp2(a.float()),
        torch.arange(n) * 3,
        a.half().float() + b.float(),
    ]
    for row, x in zip(out, expected, strict=True):
        torch.testing.assert_close(row, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x00000001, 0xFF800000, 0x7F800001])
def test_rounds_to_nearest_even(bits: int) -> None:
    x = torch.tensor([bits], dtype=torch.uint32).view(torch.float32)
    out = torch.empty(1, dtype=torch.bfloat16)
    copy_kernel[(1,)](x, out, 0, 1, BLOCK=1)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_bf16_reductions() -> None:
    x = bf16(4, 256)
    x[1, 7] = x[1, 9] = 100.0
    out, index, scan = (
        torch.empty(4, 4, dtype=torch.bfloat16),
        torch.empty(2, 4, dtype=torch.int32),
        torch.empty_like(x),
    )
    reduce_kernel[(1,)](x, out, index, scan, M=4, N=256)
    torch.testing.assert_close(out[0].double(), x.double().sum(1), rtol=0, atol=8 * 2**-8 * 100)
    torch.testing.assert_close(out[1], x.float().sum(1).bfloat16(), rtol=2**-8, atol=0)
    assert (out[2] == x.amax(1)).all() and (out[3] == x.amin(1)).all()
    assert index[0].tolist() == x.float().argmax(1).tolist() and index[1].tolist() == x.float().argmin(1).tolist()
    total = torch.zeros(4, dtype=torch.bfloat16)
    for i in range(256):
        total = total + x[:, i]
        assert (scan[:, i] == total).all()


def test_a_sum_in_bf16_loses_what_compiled_code_loses() -> None:
    x, out = torch.ones(4, 1024, dtype=torch.bfloat16), torch.empty(4, 4, dtype=torch.bfloat16)
    x[:, ::2] = 2**-9
    index, scan = torch.empty(2, 4, dtype=torch.int32), torch.empty_like(x)
    reduce_kernel[(1,)](x, out, index, scan, M=4, N=1024)
    assert (out[0] == 512).all() and (scan[:, -1] == 256).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32, torch.bool])
@pytest.mark.parametrize("stride", [1, 2])
def test_guarded_notices_a_write_beside(dtype: torch.dtype, stride: int) -> None:
    x = torch.zeros(10 * stride, dtype=dtype)[::stride]
    (a, _), (b, check_b) = guarded(x), guarded(x)
    assert a.stride() == x.stride() and torch.equal(a, x)
    copy_kernel[(1,)](a, b, 9, stride, BLOCK=16)
    check_b()
    assert torch.equal(b, x)
    a.as_strided((1,), (1,), a.storage_offset() + 10 * stride).zero_()
    copy_kernel[(1,)](a, b, 10, stride, BLOCK=16)
    with pytest.raises(AssertionError, match=f"at element {10 * stride} of"):
        check_b()


def test_guarded_takes_what_has_no_elements_or_only_one() -> None:
    for x in (torch.zeros(0, 4), torch.zeros(3, 1).expand(3, 5), torch.tensor(2.0)):
        view, check = guarded(x)
        check()
        assert view.stride() == x.stride() and torch.equal(view, x)
    view, check = guarded(torch.zeros(2, 3)[:, :2])
    view.as_strided((1,), (1,), view.storage_offset() + 2).zero_()
    with pytest.raises(AssertionError, match="at element 2 of"):
        check()


def test_what_compiled_code_would_not_do_raises() -> None:
    out = torch.zeros(16, dtype=torch.int32)
    with pytest.raises(Exception, match="use &"):
        and_kernel[(1,)](out, 5, N=16)
    with pytest.raises(Exception, match="overflow"):
        overflow_kernel[(1,)](out, 2**20)
    with pytest.raises(Exception, match="n is too small"):
        assert_kernel[(1,)](out, 2)
    assert_kernel[(1,)](out, 3)
    assert out[0] == 3


def test_autotune_runs_one_configuration() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    tuned_kernel[(1,)](out, 40)
    assert out.item() == 48
    with config(1):
        tuned_kernel[(1,)](out, 40)
    assert out.item() == 64
    with config(2):
        tuned_kernel[(1,)](out, 40)
    assert out.item() == 48


@pytest.mark.parametrize("seed", range(3))
def test_programs_meet_at_a_barrier(seed: int) -> None:
    n, rounds = 6, 3
    barrier, x, out = (torch.zeros(size, dtype=torch.int32) for size in (1, n * rounds, n))
    with interleaved(seed):
        relay_kernel[(n,)](barrier, x, out, rounds, n, BARRIER=True)
    assert (out == 6 + 36 + 216).all()


def test_a_missing_barrier_shows() -> None:
    def run(seed: int) -> list[int]:
        barrier, x, out = (torch.zeros(size, dtype=torch.int32) for size in (1, 12, 6))
        with interleaved(seed):
            relay_kernel[(6,)](barrier, x, out, 2, 6, BARRIER=False)
        return out.tolist()

    seen = [run(seed) for seed in (0, 1, 2, 0)]
    assert any(out != [42] * 6 for out in seen) and seen[0] == seen[3]


def test_a_deadlock_is_an_error() -> None:
    barrier, x, out = (torch.zeros(size, dtype=torch.int32) for size in (1, 4, 4))
    with interleaved(0), pytest.raises(Exception, match="4 of 4 programs wait"):
        relay_kernel[(4,)](barrier, x, out, 1, 5, BARRIER=True)
    assert_kernel[(1,)](out, 3)
    assert out[0] == 3


def test_a_program_that_fails_ends_all() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    with interleaved(0), pytest.raises(Exception, match="n is too small"):
        assert_kernel[(4,)](out, 2)


def test_a_lock_is_needed() -> None:
    def run(seed: int, lock: bool) -> int:
        state = torch.zeros(2, dtype=torch.int32)
        with interleaved(seed):
            lock_kernel[(2, 4, 2)](state, state[1:], LOCK=lock)
        return int(state[1])

    assert all(run(seed, True) == 16 for seed in range(3))
    assert any(run(seed, False) < 16 for seed in range(3))
