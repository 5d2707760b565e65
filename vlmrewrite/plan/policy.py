"""How a selection chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vlmrewrite.plan.needs import check_needs


@dataclass(frozen=True)
class Policy:
    """How a selection chooses: an operator over an image's vision tokens.

    Args:
        name: what listings call it.
        op: called as ``op(*inputs, member, lengths, keep, *weights, *options)`` with ``member`` bool [F] (which of the
            call's F vision tokens are left), ``lengths`` int64 [I] (tokens of each image, on the CPU) and ``keep``
            int64 [I] (how many to choose of each, on the CPU); returns the chosen ones as bool [F].
        needs: the inputs it wants, keys of :data:`NEEDS`.
        options: further arguments of ``op``.
        weights: parameters it wants, as ``block.parameter``.
    """

    name: str
    op: Callable[..., Any]
    needs: tuple[str, ...] = ()
    options: tuple[Any, ...] = ()
    weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_needs(f"policy {self.name!r}", self.needs)
