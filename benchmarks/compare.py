"""What got slower between two runs of ``vlmrewrite bench``, outside their noise.

    python -m benchmarks.compare before.json after.json

Each file is what ``vlmrewrite bench --json`` or ``python -m benchmarks.run`` wrote. A recipe's prefill and decode are
compared as shares of the unmodified model's time in the same round, which load on the machine moves little: the median
over the rounds, and half of what lies between the smallest and the largest as its spread. Slower means: by more than
both spreads together, and by more than ``--least`` (a share). What was measured in one round is not judged. The exit
status is 1 where something got slower, and 2 where the files cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

PHASES = ("prefill", "decode")
SETTING = ("model", "prompt", "dtype", "backend", "clock")
"""Two measurements are of the same thing where these are the same."""


class Share(NamedTuple):
    """Time of a recipe by that of the unmodified model: the median over the rounds, and its spread; inf for one."""

    middle: float
    spread: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} ± {self.spread:.3f}"


class Change(NamedTuple):
    """What a recipe took in one setting and phase before and after."""

    name: str
    before: Share
    after: Share

    @property
    def by(self) -> float:
        """How much longer it takes, as a share of before; below 0: it is faster."""
        return self.after.middle / self.before.middle - 1

    def beyond(self, least: float) -> bool:
        """Whether the two differ by more than both spreads, and by more than ``least``."""
        apart = abs(self.after.middle - self.before.middle)
        return apart > self.before.spread + self.after.spread and abs(self.by) > least


def read(path: Path) -> list[dict[str, Any]]:
    """The measurements of a file, one a setting.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise ValueError(f"{path}: expected a file that vlmrewrite bench --json wrote: {e}") from None
    runs = found if isinstance(found, list) else [found]
    for run in runs:
        missing = [k for k in (*SETTING, "rows") if not isinstance(run, dict) or k not in run]
        if missing:
            raise ValueError(f"{path}: expected what vlmrewrite bench --json writes, it has no {', '.join(missing)}")
    return runs


def shares(runs: list[dict[str, Any]]) -> dict[tuple[str, ...], Share]:
    """For each setting, recipe and phase, its share of the unmodified model's time."""
    found = {}
    for run in runs:
        for row in run["rows"][1:]:
            for phase in PHASES:
                each = [1 / x for x in row[f"{phase}_ratios"]]
                key = (*(str(run[k]) for k in SETTING), row["name"], phase)
                found[key] = Share(median(each), (max(each) - min(each)) / 2 if len(each) > 1 else math.inf)
    return found


def compared(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[Change]:
    """What both hold.

    Raises:
        ValueError: that is nothing.
    """
    old, new = shares(before), shares(after)
    both = [key for key in old if key in new]
    if not both:
        raise ValueError("the files have no setting and recipe in common: expected runs of the same model and prompt")
    return [Change(", ".join(key[:2] + key[-2:]), old[key], new[key]) for key in both]


def main(arguments: list[str] | None = None) -> int:
    """Print what changed outside the noise; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--least", type=float, default=0.03, help="differences that are never told, as a share [0.03]")
    options = parser.parse_args(arguments)
    try:
        changes = compared(read(options.before), read(options.after))
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    told = [c for c in changes if c.beyond(options.least)]
    for c in sorted(told, key=lambda c: -c.by):
        word = "slower" if c.by > 0 else "faster"
        print(f"{abs(c.by):6.1%} {word}: {c.name}: {c.before} -> {c.after} of the unmodified model's time")
    slower = sum(c.by > 0 for c in told)
    print(f"{len(changes)} compared: {slower} slower, {len(told) - slower} faster, the others within their noise")
    if alone := sum(math.isinf(c.before.spread + c.after.spread) for c in changes):
        print(f"{alone} of them were measured in one round, which does not tell the noise: they are not judged")
    return int(slower > 0)


if __name__ == "__main__":
    sys.exit(main())
