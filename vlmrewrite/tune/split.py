"""Which samples a search sees, and which judge what it found."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np

from vlmrewrite.evaluate import Sample
from vlmrewrite.tune.checks import check_share


def split(samples: Sequence[Sample], held_out: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """Samples to search on and samples that are held out; all that ask about the same pictures are on one side.

    Args:
        samples: all.
        held_out: share of them, above 0 and below 1, about.
        seed: of the shuffle.

    Raises:
        ValueError: there are not two sides, or the share is out of range.
    """
    check_share(held_out)
    groups = _groups(samples)
    if len(groups) < 2:
        raise ValueError(
            f"expected samples about at least two different pictures, one to search on and one held out, got"
            f" {len(samples)} about {len(groups)}"
        )
    order = [groups[i] for i in np.random.default_rng(seed).permutation(len(groups))]
    wanted, search, rest = round((1 - held_out) * len(samples)), list[Sample](), list[Sample]()
    for i, group in enumerate(order):
        side = search if not search or (len(search) < wanted and i < len(order) - 1) else rest
        side += group
    return search, rest


def _groups(samples: Sequence[Sample]) -> list[list[Sample]]:
    """Samples that share a picture, or each share one with a third, and so on."""
    graph: nx.Graph[Any] = nx.Graph()
    for i, sample in enumerate(samples):
        graph.add_node(i)
        graph.add_edges_from((i, _identity(image)) for image in sample.images)
    found = ([x for x in part if isinstance(x, int)] for part in nx.connected_components(graph))
    return [[samples[i] for i in sorted(part)] for part in found]


def _identity(image: Any) -> str:
    """What is the same for files of the same contents, and for PIL images of the same pixels."""
    if isinstance(image, Path):
        image = image.read_bytes()
    elif not isinstance(image, bytes):
        image = f"{image.mode} {image.size} ".encode() + image.tobytes()
    return hashlib.sha256(image).hexdigest()
