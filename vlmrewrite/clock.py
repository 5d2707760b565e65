"""What time it is, for measuring: on the wall and on processors."""

from __future__ import annotations

import time
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
