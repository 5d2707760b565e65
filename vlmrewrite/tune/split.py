"""Which samples a search sees, and which judge what it found."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmrewrite.evaluate import Sample


def split(samples: Sequence[Sample], held_out: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to search on and samples that are held out; all that ask about the same pictures are on one side.

    Args:
        samples: all.
        held_out: share of them, above 0 and below 1, about.
        seed: of the shuffle.

    Raises:
        ValueError: there are not two sides, or the share is out of range.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a share of the samples, above 0 and below 1, got {held_out}")
    groups = dict[Any, list[Sample]]()
    for sample in samples:
        groups.setdefault(tuple(map(_identity, sample.images)), []).append(sample)
    if len(groups) < 2:
        raise ValueError(
            f"expected samples about at least two different pictures, one to search on and one held out, got"
            f" {len(samples)} about {len(groups)}"
        )
    order = list(groups.values())
    order = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
    wanted, search, rest = round((1 - held_out) * len(samples)), list[Sample](), list[Sample]()
    for i, group in enumerate(order):
        side = search if not search or (len(search) < wanted and i < len(order) - 1) else rest
        side += group
    return search, rest


def _identity(image: Any) -> object:
    if isinstance(image, Path):
        return image.resolve()
    return hashlib.sha256(image if isinstance(image, bytes) else image.tobytes()).hexdigest()
