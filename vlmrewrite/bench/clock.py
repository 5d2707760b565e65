"""Time and memory of a piece of work, undisturbed."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """While the block runs, Python collects no garbage, whose time would be put down to whoever is measured then."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def set_apart() -> Iterator[None]:
    """While the block runs, collections do not go through what is there now."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def peak_of(run: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """What a function returns, and how many bytes its tensors on a device needed at a time, beyond those of before.

    Both are the allocator's own counts. On a CPU they come from PyTorch's profiler, which slows the function down.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before, out = torch.cuda.memory_allocated(device), run()
        torch.cuda.synchronize(device)
        return out, torch.cuda.max_memory_allocated(device) - before
    with _quiet_profiler(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        out = run()
    sizes: Any = [e.nbytes() for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    return out, max(itertools.accumulate(sizes, initial=0))


@contextlib.contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Without its lines on stderr that it begins and ends; it reads this when it is first used."""
    before = os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        yield
    finally:
        if before == "99":
            os.environ.pop("KINETO_LOG_LEVEL", None)
