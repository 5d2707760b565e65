"""Time and memory of a piece of work."""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

T = TypeVar("T")

Clock = Literal["process", "wall"]


class Seconds(NamedTuple):
    """Of the clock on the wall, and of all threads of this process on processors."""

    wall: float
    process: float

    def since(self, before: Seconds) -> Seconds:
        """What has passed."""
        return Seconds(self.wall - before.wall, self.process - before.process)


def now() -> Seconds:
    """The time, once a GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Seconds(time.perf_counter(), time.process_time())


def clock_of(device: torch.device) -> Clock:
    """The clock that ratios go by: process time for one thread on a CPU, which other load on the machine moves less."""
    return "process" if device.type == "cpu" and torch.get_num_threads() == 1 else "wall"


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
