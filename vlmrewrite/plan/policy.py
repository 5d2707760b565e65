"""How a selection chooses, and what it may ask for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

NEEDS = {
    "features": "projected vision features, [F, C]",
    "encoder_features": "what the projector took, [F, C']",
    "attention": "weight received from the last prompt token at that layer, fp32 [F]",
    "attention_outside": "the same, paid to the vision tokens that are not in the source or the edited set, fp32 [F]",
    "ordinal": "number of each image within its row, int64 [I], on the CPU",
    "grid": "rows and columns of each image's tokens, int64 [I, 2], on the CPU",
    "stream": "hidden states at that layer's entry, [B, T, H]",
    "text": "the text tokens, bool [B, T]",
    "prompt": "the text tokens up to the last prompt token, bool [B, T]",
    "flat": "row * T + column of each vision token, int64 [F]",
    "lengths": "tokens of each image, int64 [I], on the CPU",
}
"""What a policy or an edit can ask for."""


def check_needs(who: str, needs: tuple[str, ...]) -> None:
    """Raise ValueError for a need that is not in :data:`NEEDS`."""
    for need in needs:
        if need not in NEEDS:
            raise ValueError(f"{who} needs {need!r}; expected one of {', '.join(NEEDS)}")


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
