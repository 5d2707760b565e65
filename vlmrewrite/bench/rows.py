"""What was measured of one recipe, and what is told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from vlmrewrite.clock import Clock

UNMODIFIED = "unmodified"


@dataclass
class Row:
    """What was measured for one recipe.

    Attributes:
        name: the recipe, or ``"unmodified"``.
        prefill: seconds of each prefill (images encoded before), in order.
        decode: seconds per token of each decoding run, in order.
        prefill_process, decode_process: the same in process time: seconds of all its threads on processors.
        first: seconds of the first prefill, with all that is traced, compiled and tried out for it, and was not before.
        peak_bytes: that tensors need at a time during a prefill, beyond those of before, as the allocator counts them.
        kv_bytes: keys and values in the cache after prefill.
        flops: matmul FLOPs of the decoder layers' prefill; None for the unmodified model without a recipe beside it.
        flops_before: those of the unmodified model.
        passes_refused: passes that did nothing, and why.
        error: of the native loop, the largest difference of a logit from the recipe's.
        refused: why there is no native loop.
    """

    name: str
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    prefill_process: list[float] = field(default_factory=list)
    decode_process: list[float] = field(default_factory=list)
    first: float = 0.0
    peak_bytes: int = 0
    kv_bytes: int = 0
    flops: int | None = None
    flops_before: int | None = None
    passes_refused: list[str] = field(default_factory=list)
    error: float | None = None
    refused: str | None = None

    def seconds(self, phase: str, clock: Clock) -> list[float]:
        """Of each round by a clock: ``"prefill"``, or ``"decode"`` for one token."""
        found: list[float] = getattr(self, phase if clock == "wall" else f"{phase}_process")
        return found


def spread(samples: Sequence[float]) -> float:
    """Half of what lies between the smallest and the largest sample, as a share of their median."""
    return (max(samples) - min(samples)) / 2 / median(samples)


def summary(row: Row, base: Row, clock: Clock) -> dict[str, Any]:
    """A row with medians, spreads, and how many times as long the base takes: the median over the rounds."""
    out = {k: x for k, x in asdict(row).items() if k not in ("flops_before", "error", "refused")}
    for phase in ("prefill", "decode"):
        took, other = row.seconds(phase, clock), base.seconds(phase, clock)
        ratios = [b / a for a, b in zip(took, other, strict=True)]
        out |= {f"{phase}_median": median(took), f"{phase}_spread": spread(took), f"{phase}_ratios": ratios}
        out[f"{phase}_speedup"] = median(ratios)
    out |= {"decode_tokens_per_second": 1 / out["decode_median"], "kv_ratio": base.kv_bytes / row.kv_bytes}
    if row.flops and base.flops:
        out["flop_ratio"] = base.flops / row.flops
        out["prefill_speedup_of_flop_ratio"] = out["prefill_speedup"] / out["flop_ratio"]
    return out
