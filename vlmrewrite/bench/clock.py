"""Time and memory of a piece of work."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch

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


def memory_reset() -> int | None:
    """Start to watch for the largest memory in use; returns what is in use now, in bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def memory_peak(before: int | None) -> int | None:
    """Bytes that were in use at most since :func:`memory_reset`, beyond what it returned; None where unknown."""
    if before is None:
        return None
    return (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")) - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")
