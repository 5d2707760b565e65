"""What one cell of the table says: a technique under one case of one family."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import vlmrewrite
from vlmrewrite.errors import CaptureError
from vlmrewrite.testing.agreement import Agreement

Status = Literal["ok", "refused", "wrong", "failed", "absent"]

MARKS: dict[Status, str] = {"ok": ".", "refused": "r", "wrong": "W", "failed": "X", "absent": "-"}
"""How the printed table shows each status."""

MEANINGS: dict[Status, str] = {
    "ok": "agrees with the oracle",
    "refused": "an error says why not",
    "wrong": "differs from the oracle",
    "failed": "an exception that is no refusal, or nothing to judge by",
    "absent": "the unmodified model does not do it",
}

_CLEAR = (ValueError, NotImplementedError, CaptureError)

_NOT_WORSE: dict[Status, tuple[Status, ...]] = {
    "ok": ("ok",),
    "refused": ("ok", "refused", "absent"),
    "absent": ("ok", "refused", "absent"),
    "wrong": ("ok", "refused", "absent", "wrong"),
    "failed": ("ok", "refused", "absent", "wrong", "failed"),
}

_LONGEST = 300  # characters of a reason

_FOLDERS = re.compile(r"[^\s\"'(]*/(?:site-packages/|(?=vlmrewrite/))")
"""What stands before a source file's path because of where it is installed."""


@dataclass(frozen=True)
class Cell:
    """What came out.

    Attributes:
        status: a key of :data:`MEANINGS`.
        error: largest absolute difference of a logit from the oracle; None where nothing was compared.
        tolerance: what it may be at most.
        reason: for whatever is not ok, why, in one line.
    """

    status: Status
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""

    def worse_than(self, kept: Cell) -> bool:
        """Whether it is a step back from a kept cell."""
        return self.status not in _NOT_WORSE[kept.status]

    def __str__(self) -> str:
        if self.status == "ok":
            return "ok" if self.error is None else f"ok ({self.error:.1g} of {self.tolerance:.1g})"
        return f"{self.status}: {self.reason}"


@dataclass
class Record:
    """All that is known of a family.

    Attributes:
        versions: of torch and transformers, that it was measured with.
        capture_seconds: CPU time to capture its forward for the first time and to analyse it; None: that failed.
        graphs: how many graphs ``generate()`` needs over changing lengths, numbers of images and padding: for batches,
            and for one row; None if that could not be counted.
        cells: by case and technique.
        moved: configurations of techniques that are tried in other layers here, as some layers have no attention.
        alone: what the unmodified model raises for videos with images beside them, if so; they are tried without.
    """

    versions: str = ""
    capture_seconds: float | None = None
    graphs: tuple[int, int] | None = None
    cells: dict[str, dict[str, Cell]] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    alone: str = ""

    @property
    def counted(self) -> str:
        """The graphs of batches and those of one row, as ``2+2``; ``?`` if they could not be counted."""
        return "?" if self.graphs is None else f"{self.graphs[0]}+{self.graphs[1]}"

    def worse_than(self, kept: Record) -> list[str]:
        """What is a step back from the kept record, a line each."""
        said = []
        for case, row in kept.cells.items():
            for technique, old in row.items():
                new = self.cells.get(case, {}).get(technique)
                if new is None or new.worse_than(old):
                    said.append(f"{case}, {technique}: {old} -> {new or 'not measured'}")
        now, then = self.graphs, kept.graphs
        if then is not None and (now is None or now[0] > then[0] or now[1] > then[1]):
            said.append(f"graphs: {kept.counted} -> {self.counted}")
        return said


def judged(check: Callable[[], Agreement | None]) -> Cell:
    """The cell of a check that ends with an agreement, with None if there is nothing to compare, or with an error."""
    try:
        found = check()
    except Exception as e:
        return of_error(e)
    if found is None:
        return Cell("ok")
    error, tolerance = float(f"{found.error:.2g}"), float(f"{found.tolerance:.2g}")
    if found.kv_lengths != found.planned:
        reason = f"K/V lengths {found.kv_lengths}; {found.planned} were planned"
        return Cell("wrong", error, tolerance, reason)
    if not found.error <= found.tolerance:
        reason = f"logits are {found.error:.2g} off; {found.tolerance:.2g} is allowed"
        return Cell("wrong", error if math.isfinite(error) else None, tolerance, reason)
    return Cell("ok", error, tolerance)


def of_error(error: Exception) -> Cell:
    """The cell of an exception: a refusal is one that vlmrewrite itself raised, of a kind that says what is wrong."""
    home = Path(vlmrewrite.__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    places = [Path(f.filename).relative_to(home).parts[0] if home in Path(f.filename).parents else "" for f in frames]
    text = str(error).partition("\nfrom user code")[0]  # Dynamo's
    if "oracle" in places:
        return Cell("failed", reason=one_line(f"not judged: {type(error).__name__}: {text}"))
    if isinstance(error, _CLEAR) and places[-1:] not in ([""], ["testing"]):
        return Cell("refused", reason=one_line(text))
    at = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return Cell("failed", reason=one_line(f"{type(error).__name__}: {text}", at))


def one_line(text: str, behind: str = "") -> str:
    """The text without line breaks and without the folders of this installation, cut where it is long."""
    flat = _FOLDERS.sub("", " ".join(text.split()))
    return (flat if len(flat) <= _LONGEST else flat[: _LONGEST - 3] + "...") + behind


def cell_data(cell: Cell) -> dict[str, Any]:
    """A cell for JSON."""
    return {name: value for name, value in vars(cell).items() if value not in (None, "")}
