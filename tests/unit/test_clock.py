"""The largest memory that something needs, on a CPU: the same however much was freed before."""

from __future__ import annotations

import os

import pytest
import torch

from vlmrewrite.bench.clock import peak_of

MIB = 2**20


def held(pieces: int, size: int) -> int:
    """Holds so many tensors of so many bytes at once, and frees them."""
    return len([torch.empty(size, dtype=torch.uint8) for _ in range(pieces)])


@pytest.mark.parametrize("size", [MIB // 64, MIB // 4, 4 * MIB])
def test_the_peak_is_what_is_needed_also_of_memory_that_was_freed(size: int) -> None:
    there = torch.ones(MIB)
    for mib in (16, 16, 8, 16):
        pieces = mib * MIB // size
        assert peak_of(lambda n=pieces: held(n, size), torch.device("cpu")) == (pieces, mib * MIB)
    assert there.sum() == MIB


def test_what_is_freed_on_the_way_counts_once(capfd: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    _, peak = peak_of(lambda: [held(1, MIB) for _ in range(8)], torch.device("cpu"))
    assert peak == MIB
    assert dict(os.environ) == before
    assert capfd.readouterr() == ("", "")
