"""What a user wishes: how much a recipe may cost, and how much accuracy it may lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from vlmrewrite.errors import one_of, shown

KINDS = {
    "flops": "FLOPs of the decoder's prefill",
    "kv": "bytes of keys and values",
    "latency": "seconds of the prefill",
}
"""What a budget is a share of, of the unmodified model's."""


@dataclass(frozen=True)
class Wish:
    """A budget and a largest loss.

    Attributes:
        kind: one of :data:`KINDS`.
        share: of what the unmodified model costs, above 0 and below 1.
        max_drop: how much lower the mean score may be, from 0 to 1; None: as little as can be had.
    """

    kind: str
    share: float
    max_drop: float | None = None

    @classmethod
    def of(cls, budget: str | Mapping[str, float], max_drop: float | str | None = None) -> Wish:
        """The wish that ``"flops=0.3"`` or ``{"flops": 0.3}``, and ``0.01`` or ``"1%"``, stand for.

        Raises:
            ValueError: it is none, or a number is out of range.
        """
        kind, share = _named(budget)
        if kind not in KINDS:
            raise ValueError(f"budget: unknown kind {kind!r}, {one_of(kind, KINDS)}")
        if not is_a(Real, share) or not 0 < share < 1:
            raise ValueError(
                f"budget {kind}: expected a share of the unmodified model's {KINDS[kind]}, above 0 and below 1,"
                f" got {shown(share)}"
            )
        drop: Any = drop_of(max_drop) if isinstance(max_drop, str) else max_drop
        if drop is not None and (not is_a(Real, drop) or not 0 <= drop <= 1):
            raise ValueError(
                f"max_drop: expected a drop of the mean score from 0 to 1 (0.01 is 1 %), got {shown(max_drop)}"
            )
        return cls(kind, float(share), None if drop is None else float(drop))

    @property
    def counted(self) -> str:
        """The cost that is known without a run: by which latency goes, too, until it is measured."""
        return "flops" if self.kind == "latency" else self.kind

    def __str__(self) -> str:
        drop = "" if self.max_drop is None else f", at most {100 * self.max_drop:g} % lost"
        return f"{self.kind}={self.share:g}{drop}"


def _named(budget: Any) -> tuple[str, Any]:
    """Kind and share."""
    if isinstance(budget, Mapping) and len(budget) == 1:
        [(kind, share)] = budget.items()
        return str(kind), share
    if isinstance(budget, str) and budget.count("=") == 1:
        kind, text = (part.strip() for part in budget.split("="))
        try:
            return kind, float(text)
        except ValueError:
            return kind, text
    raise ValueError(f"budget: expected one such as flops=0.3 or {{'flops': 0.3}}, got {shown(budget)}")


def drop_of(text: str, name: str = "max_drop") -> float | None:
    """What ``1%``, ``0.01`` or ``any`` says.

    Raises:
        ValueError: it is none of these.
    """
    if text == "any":
        return None
    try:
        return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise ValueError(f"{name}: expected a share such as 1% or 0.01, or any, got {text!r}") from None


def is_a(kind: type, value: Any) -> bool:
    """Whether it is a number of that kind; no bool is one."""
    return isinstance(value, kind) and not isinstance(value, bool)
