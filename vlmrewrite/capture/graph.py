"""One captured graph, and what later stages make of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.fx

T = TypeVar("T")


class Graph:
    """One captured graph of a model.

    Attributes:
        gm: the graph.
        features: for images and videos, if it takes them, by name the tensors of the vision tower's output that are
            among its inputs, and which these are; None before its first run, and of a graph of text.
        parameters: for each of its inputs that is a decoder layer's parameter, the layer and the name within it.
        derived: what later stages made of it, by their own keys; it dies with the graph.
        lock: held while something is derived.
    """

    def __init__(self, gm: torch.fx.GraphModule) -> None:
        self.gm = gm
        self.features: dict[str, dict[str, int]] | None = None
        self.parameters: dict[str, tuple[int, str]] = {}
        self.derived: dict[object, Any] = {}
        self.lock = threading.RLock()

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What was derived under a key; made at the first request for it, by one thread."""
        if key not in self.derived:
            with self.lock:
                if key not in self.derived:
                    self.derived[key] = make()
        return cast(T, self.derived[key])
