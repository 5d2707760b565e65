"""What is wrong with a run before anything is read or loaded for it."""

from __future__ import annotations

import math
import os


def check_settings(*, lr: float, distil: float, save_every: int | None, **counts: int) -> None:
    """Raise ValueError for a setting that no run can have.

    Args:
        lr, distil: numbers.
        save_every: steps, or None.
        counts: what is at least 1, by name.
    """
    least = counts if save_every is None else counts | {"save_every": save_every}
    if wrong := [f"{name}={value!r}" for name, value in least.items() if type(value) is not int or value < 1]:
        raise ValueError(f"expected integers of at least 1, got {', '.join(wrong)}")
    if not (_is_number(lr) and lr > 0 and _is_number(distil) and distil >= 0):
        raise ValueError(f"expected numbers lr > 0 and distil >= 0, got lr={lr!r} and distil={distil!r}")


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def is_first_process() -> bool:
    """Whether this process writes and prints, of those that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"
