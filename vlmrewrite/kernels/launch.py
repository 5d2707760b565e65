"""What several launchers share: the number of processors, how keys are split among them, the softcap."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

DEFAULT_PROCESSORS = 132
"""Streaming multiprocessors to plan for where there is no device to ask."""


@functools.cache
def processors(device: torch.device) -> int:
    """How many streaming multiprocessors a device has."""
    if device.type != "cuda":
        return DEFAULT_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache(maxsize=256)
def splits(programs: int, keys: int, rows: int, device: torch.device, most: int = 128) -> tuple[int, int]:
    """Into how many parts to split the keys, so that all multiprocessors have work until the end.

    The least number whose last wave of programs is nearly as full as that of any other; parts are long enough for
    reading them to cost more than joining them.

    Args:
        programs: that there are for each part.
        keys: to be split, 1 or more.
        rows: query rows of a program; joining costs as many fp32 vectors.
        device: where they run; two programs share a multiprocessor.
        most: parts, at most.

    Returns:
        (number of parts, length of a part in keys, a multiple of 128).
    """
    slots = 2 * processors(device)
    most = max(1, min(most, keys // max(128, 16 * rows)))

    def used(n: int) -> float:
        return programs * n / (-(-programs * n // slots) * slots)

    enough = 0.85 * max(used(n) for n in range(1, most + 1))
    n = next(n for n in range(1, most + 1) if used(n) >= enough)
    length = -(-keys // (n * 128)) * 128
    return -(-keys // length), length


@triton.jit
def capped(x, softcap, CAPPED: tl.constexpr):  # type: ignore[no-untyped-def]
    """``softcap * tanh(x / softcap)``, exact to fp32's rounding of 1."""
    if CAPPED:
        x = softcap * (1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E) / softcap) + 1.0))
    return x
