"""The kept table of families as parts of a page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from vlmrewrite.testing.matrix.cells import Cell, Record
from vlmrewrite.testing.matrix.table import KEPT, axes, counts, read


def page(table: Callable[..., str]) -> str:
    """All of it; ``table`` makes a table of headings and rows."""
    kept = read(KEPT)
    return "\n\n".join([summary(kept), table(*overview(kept)), "## What does not work, and why", *reasons(kept)])


def summary(kept: Mapping[str, Record]) -> str:
    """How much of it works."""
    whole = sum(all(c.status in ("ok", "absent") for c in _cells(record)) for record in kept.values())
    told = ", ".join(f"{n} {status}" for status, n in counts(kept).items() if n)
    return (
        f"{len(kept)} families; {whole} of them do all that their unmodified models do, under every technique here."
        f" In cells: {told}."
    )


def overview(kept: Mapping[str, Record]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows of the table."""
    cases, _ = axes(kept)
    rows = []
    for name, record in kept.items():
        compared = [c.error / c.tolerance for c in _cells(record) if c.status == "ok" and c.error and c.tolerance]
        seconds = "" if record.capture_seconds is None else f"{record.capture_seconds:g} s"
        found = [_share(list(record.cells.get(case, {}).values())) for case in cases]
        largest = f"{max(compared):.0%}" if compared else ""
        rows.append([f"`{name}`", *found, largest, seconds, record.counted.replace("?", "")])
    return ["family", *cases, "largest error, of what is allowed", "capture", "graphs"], rows


def reasons(kept: Mapping[str, Record]) -> Iterator[str]:
    """For each family that does not do all, what it does not do, and why; and which techniques are others there."""
    for name, record in kept.items():
        found: dict[str, dict[str, list[str]]] = {}
        for case, row in record.cells.items():
            for technique, cell in row.items():
                if cell.status != "ok":
                    found.setdefault(f"{cell.status}: {_code(cell.reason)}", {}).setdefault(case, []).append(technique)
        if found or record.moved or record.alone:
            yield f"### {name}"
        if record.moved:
            yield f"Some layers have no attention; tried as {', '.join(map(_code, record.moved.values()))}."
        if record.alone:
            yield f"Videos are tried without images: with both, the unmodified model raises {_code(record.alone)}"
        if found:
            yield "\n".join(f"- {_where(cases, record)}: {said}" for said, cases in found.items())


def _where(cases: Mapping[str, list[str]], record: Record) -> str:
    """The cases and techniques that share a reason; techniques are left out where all of them do."""
    by_techniques: dict[str, list[str]] = {}
    for case, techniques in cases.items():
        which = "" if len(techniques) == len(record.cells[case]) else f" ({', '.join(techniques)})"
        by_techniques.setdefault(which, []).append(case)
    return "; ".join(", ".join(names) + which for which, names in by_techniques.items())


def _share(cells: list[Cell]) -> str:
    there = [c for c in cells if c.status != "absent"]
    bad = [f"{n} {status}" for status in ("wrong", "failed") if (n := sum(c.status == status for c in there))]
    fine = sum(c.status == "ok" for c in there)
    if not there:
        return "–"
    return ", ".join(["ok" if fine == len(there) else f"{fine} of {len(there)}", *bad])


def _cells(record: Record) -> list[Cell]:
    return [cell for row in record.cells.values() for cell in row.values()]


def _code(text: str) -> str:
    """Text that is shown as it is."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"
