"""Which tests a run of whole folders leaves out, so that it takes minutes; CI runs all of them."""

from __future__ import annotations

import functools
import subprocess
import zlib
from collections.abc import Sequence
from pathlib import Path

import pytest

PARTS = 3
"""One of so many is run, of slow tests and of the cases of a test marked wide."""


@functools.cache
def turn() -> int:
    """Whose turn it is of the parts of the slow tests: another one's with most commits; the first one's without git."""
    command = ["git", "rev-parse", "--short=8", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(done.stdout, 16) % PARTS


def left_out(items: Sequence[pytest.Item], turn: int) -> set[pytest.Item]:
    """Of slow tests all but a third, another one with each turn; of tests marked wide all but a third of the cases.

    Which cases stay differs from test to test and from turn to turn, and at least one does.
    """
    left = set[pytest.Item]()
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        name, _, case = item.nodeid.partition("[")
        if item.get_closest_marker("slow") and zlib.crc32(name.encode()) % PARTS != turn:
            left.add(item)
        elif case and item.get_closest_marker("wide"):
            cases.setdefault(name, []).append(item)
    for name, some in cases.items():
        first = (zlib.crc32(name.encode()) // PARTS + turn) % min(PARTS, len(some))
        left |= {*some} - {*some[first::PARTS]}
    return left
