"""Triton's interpreter made fit for tests, and tensors that notice a write beside them.

Under ``TRITON_INTERPRET=1`` kernels run on the CPU, but up to Triton 3.9 the interpreter computes with the bits of
bfloat16 numbers as if they were integers, and accepts code that the compiler rejects or reads otherwise.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter as stock
from triton.runtime.autotuner import Autotuner

_chosen = [0]


def trustworthy() -> None:
    """Make the interpreter agree with the compiler, in this process; without ``TRITON_INTERPRET=1``, do nothing.

    - bfloat16: arithmetic, dots, reductions, scans and casts round to nearest even, after every operation; a sum rounds
      after each level of its tree, as compiled code does. (Atomic operations on bfloat16 raise.)
    - ``tl.dot`` rounds fp32 operands to TF32 where it was not told otherwise, and refuses an inner size that is too
      small for a GPU.
    - ``tl.device_assert`` is active, and with it the checks for integer overflow.
    - ``and``, ``or``, ``not`` and ``if`` on a block raise TypeError.
    - An autotuned kernel runs one configuration: the first, or the one that :func:`config` names.
    - numpy's warnings on infinity and NaN are off, as on a device.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        _patch()


@contextlib.contextmanager
def config(n: int) -> Iterator[None]:
    """Interpret the n-th configuration of every autotuned kernel, of those that are left after pruning (modulo)."""
    before, _chosen[0] = _chosen[0], n
    try:
        yield
    finally:
        _chosen[0] = before


def guarded(t: Tensor, pad: int = 4096) -> tuple[Tensor, Callable[[], None]]:
    """A copy of a tensor, with its strides, inside of memory that no kernel may touch.

    Args:
        t: any shape, strides, dtype and device.
        pad: elements before and after it.

    Returns:
        The copy, and a check that raises AssertionError if memory around it, or between its elements, was written.
        That memory holds NaN, the largest integer, or True, so that reading it shows in results.
    """
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else -1
    inexact = t.is_floating_point() or t.is_complex()
    filler = float("nan") if inexact else True if t.dtype == torch.bool else torch.iinfo(t.dtype).max
    memory = torch.full((last + 1 + 2 * pad,), filler, dtype=t.dtype, device=t.device)
    outside = torch.ones_like(memory, dtype=torch.bool)
    view = memory.as_strided(t.shape, t.stride(), pad)
    if t.numel():
        once = tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())
        view[once] = t.detach()[once]
        outside.as_strided(t.shape, t.stride(), pad)[once] = False
    before = memory.clone()

    def check() -> None:
        now, then = (x.view(torch.uint8).view(len(memory), -1) for x in (memory, before))
        written = ((now != then).any(1) & outside).nonzero()
        assert not len(written), f"wrote outside of the tensor, at element {int(written[0]) - pad} of its memory"

    return view, check


def _is_bf16(x: Any) -> bool:
    return isinstance(x, stock.TensorHandle) and x.dtype.scalar == tl.bfloat16 and x.data.dtype == np.uint16


def _wide(x: Any) -> Any:
    """A handle in float32 if it is in bfloat16, else itself."""
    return stock.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if _is_bf16(x) else x


def _bits(x: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bfloat16 numbers, ties to even."""
    bits = np.asarray(x, dtype=np.float32).view(np.uint32)
    kept = bits >> 16
    rounded = (bits + (0x7FFF + (kept & 1))) >> 16
    return np.where(np.isnan(x), kept | 0x40, rounded).astype(np.uint16)


def _narrow(data: npt.NDArray[Any]) -> Any:
    return stock.TensorHandle(_bits(data), tl.bfloat16)


def _tf32(x: Any) -> Any:
    bits = x.data.view(np.uint32)
    rounded = (bits + (0x0FFF + ((bits >> 13) & 1))) & np.uint32(0xFFFFE000)
    data = np.where(np.isfinite(x.data), rounded.view(np.float32), x.data)
    return stock.TensorHandle(data, x.dtype)


def _computed_wide(compute: Callable[..., Any]) -> Callable[..., Any]:
    """One operation of the interpreter, on bfloat16 too."""

    def run(self: Any, *args: Any) -> Any:
        if not any(_is_bf16(x) for x in args):
            return compute(self, *args)
        out = compute(self, *(_wide(x) for x in args))
        return _narrow(out.data) if out.data.dtype == np.float32 else stock.TensorHandle(out.data, tl.int1)

    return run


@functools.cache
def _patch() -> None:
    builder = stock.InterpreterBuilder
    for name in ("binary_op", "ternary_op", "unary_op", "create_fma"):
        setattr(builder, name, _computed_wide(getattr(builder, name)))
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)  # Triton < 3.8 kept NaN
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    _patch_casts(builder)
    _patch_dot(builder)
    _patch_reductions()
    _patch_language()
    _patch_launch()
    stock.interpreter_builder.options = stock.InterpreterOptions(debug=True)


def _patch_casts(builder: Any) -> None:
    cast, fp_to_fp = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16:
            return src if _is_bf16(src) else _narrow(src.data.astype(np.float32))
        src = _wide(src)
        return src if dst_type.scalar == src.dtype.scalar == tl.float32 else cast(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        wide = min(src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth) >= 16
        if wide and tl.bfloat16 in (src.dtype.scalar, dst_type.scalar) and rounding != stock._ir.ROUNDING_MODE.RTZ:
            return self.cast_impl(src, dst_type)
        return fp_to_fp(self, src, dst_type, rounding)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
    builder.get_bf16 = lambda self, value: _narrow(np.array([value], dtype=np.float32))


def _patch_dot(builder: Any) -> None:
    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        a, b, single = _wide(a), _wide(b), a.dtype.scalar == tl.float32
        if single and precision == stock._ir.INPUT_PRECISION.TF32:
            a, b = _tf32(a), _tf32(b)
        return dot(self, a, b, d, precision, *rest)

    def least(lhs: Any, rhs: Any) -> tuple[int, int, int]:
        return 1, 1, {8: 32, 16: 16, 32: 8, 64: 4}[lhs.scalar.primitive_bitwidth]

    builder.create_dot = create_dot
    stock.interpreter_builder.codegen_fns["min_dot_size"] = least


def _patch_reductions() -> None:
    total, extreme = stock.ReduceOps.sum, stock.ReduceOps.min_max

    def add(self: Any, input: Any) -> Any:
        if not _is_bf16(input.handle):
            return total(self, input)
        x, axis = _wide(input.handle).data, self.axis
        shape = np.sum(x, axis=axis, keepdims=self.keep_dims).shape
        x = x.reshape(-1) if axis is None else np.moveaxis(x, axis, -1)
        while (n := x.shape[-1]) > 1:
            x = _wide(_narrow(x[..., : n // 2] + x[..., n // 2 :])).data
        return self.to_tensor(_bits(x).reshape(shape), tl.bfloat16)

    def min_max(self: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
        input = input[0] if isinstance(input, tuple) else input
        if not _is_bf16(input.handle):
            return extreme(self, input, *args, **kwargs)
        found = extreme(self, self.to_tensor(_wide(input.handle).data, tl.float32), *args, **kwargs)
        both = found if isinstance(found, tuple) else (found,)
        both = tuple(self.to_tensor(_bits(x.handle.data), tl.bfloat16) if x.dtype == tl.float32 else x for x in both)
        return both if isinstance(found, tuple) else both[0]

    def scan(known: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, x: self.generic_scan([x]) if _is_bf16(x.handle) else known(self, x)

    stock.ReduceOps.sum, stock.ReduceOps.min_max = add, min_max
    stock.ScanOps.cumsum, stock.ScanOps.cumprod = scan(stock.ScanOps.cumsum), scan(stock.ScanOps.cumprod)


def _patch_language() -> None:
    patch_tensor = stock._patch_lang_tensor

    def truth(self: Any) -> bool:
        if sys._getframe(1).f_globals["__name__"].startswith("triton."):
            return True  # Triton asks whether it was given a tensor
        if self.type.is_block():
            raise TypeError("a block has neither truth value nor `and`, `or`, `not`; use &, |, ~")
        return bool(self.handle.data.item())

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__bool__", truth)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))  # numpy 2.4, Triton < 3.9

    stock._patch_lang_tensor = patch


def _patch_launch() -> None:
    launch = stock.GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return launch(self, *args, **kwargs)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        left = self.prune_configs(kwargs)
        chosen = left[_chosen[0] % len(left)]
        named = {**self.nargs, **kwargs, **chosen.all_kwargs()}
        self.pre_hook(named, reset_only=True)
        if chosen.pre_hook is not None:
            chosen.pre_hook(named)
        self.best_config, self.nargs = chosen, None
        return self.fn.run(*args, **kwargs, **chosen.all_kwargs())

    stock.GridExecutor.__call__, Autotuner.run = call, run
