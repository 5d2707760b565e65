"""The kept table: read, written family by family, compared, and printed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from vlmrewrite.errors import blamed_on, one_of
from vlmrewrite.testing.matrix.cells import MARKS, MEANINGS, Cell, Record, cell_data

KEPT = Path(__file__).with_name("families.json")
"""The table of the last run, a path for the functions here."""


def read(path: Path) -> dict[str, Record]:
    """A kept table, by family.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file does not hold one.
    """
    with path.open() as file, blamed_on(path, "the table of families"):
        families = json.load(file)
        return {name: _record(data) for name, data in families.items()}


def read_if_there(path: Path) -> dict[str, Record]:
    """A kept table; an empty one if there is no file."""
    return read(path) if path.exists() else {}


def record_data(record: Record) -> dict[str, Any]:
    """A record for JSON."""
    cells = {case: {name: cell_data(cell) for name, cell in row.items()} for case, row in record.cells.items()}
    return {name: x for name, x in vars(record).items() if x not in ({}, "")} | {"cells": cells}


def _record(data: dict[str, Any]) -> Record:
    cells = {case: {name: Cell(**cell) for name, cell in row.items()} for case, row in data["cells"].items()}
    graphs = None if data["graphs"] is None else tuple(data["graphs"])
    return Record(**data | {"graphs": graphs, "cells": cells})


def write(families: Mapping[str, Record], path: Path) -> None:
    """Keep a table, a cell a line, so that a change shows which; whoever reads it meanwhile sees the old one or this.

    Raises:
        OSError: it cannot be written there.
    """
    parts = []
    for name, record in sorted(families.items()):
        lines = [
            f"  {json.dumps(key)}: {json.dumps(value)},"
            for key, value in vars(record).items()
            if value not in ({}, "") and key != "cells"
        ]
        cases = []
        for case, row in record.cells.items():
            cells = ",\n".join(f"      {json.dumps(t)}: {json.dumps(cell_data(cell))}" for t, cell in row.items())
            cases.append(f"    {json.dumps(case)}: {{\n{cells}\n    }}")
        joined = ",\n".join(cases)
        parts.append("\n".join([f"{json.dumps(name)}: {{", *lines, f'  "cells": {{\n{joined}\n  }}', "}"]))
    draft = path.with_suffix(".part")
    draft.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    os.replace(draft, path)


def fifth(names: Sequence[str], which: int) -> list[str]:
    """Every fifth of the names in order, from the one at ``which`` (0 to 4) on."""
    return sorted(names)[which::5]


def chosen(names: Sequence[str], families: Iterable[str], what: str) -> list[str]:
    """The names, each once and in order, all of which are there.

    Raises:
        ValueError: one is not.
    """
    there = list(families)
    for name in names:
        if name not in there:
            raise ValueError(f"--family: {what} {name!r}, {one_of(name, there)}")
    return sorted(set(names))


def worse(name: str, record: Record, path: Path) -> list[str]:
    """What is a step back from the kept table, a line each; a family that it does not have is one."""
    kept = read_if_there(path)
    if name not in kept:
        return [f"the table does not have it; measure and keep it: vlmrewrite families --run --family {name}"]
    return record.worse_than(kept[name])


def marks(families: Mapping[str, Record]) -> Iterator[str]:
    """The table as text of at most 80 columns: a family a line, a mark a cell; and what the marks mean."""
    cases, techniques = axes(families)
    width = max(map(len, families), default=0)
    sizes = [max(len(case), len(techniques)) for case in cases]
    yield "  ".join([" " * width, *(case.ljust(n) for case, n in zip(cases, sizes, strict=True))]).rstrip() + "  graphs"
    for name, record in families.items():
        rows = [record.cells.get(case, {}) for case in cases]
        drawn = ["".join(MARKS[row[t].status] if t in row else "?" for t in techniques) for row in rows]
        cells = [text.ljust(n) for text, n in zip(drawn, sizes, strict=True)]
        yield "  ".join([name.ljust(width), *cells, record.counted])
    yield ""
    yield f"marks, from left to right: {', '.join(techniques)}"
    yield from (f"  {MARKS[status]} {status:8} {meaning}" for status, meaning in MEANINGS.items())


def axes(families: Mapping[str, Record]) -> tuple[list[str], list[str]]:
    """The cases and the techniques of a table."""
    rows = [(case, row) for record in families.values() for case, row in record.cells.items()]
    return list(dict.fromkeys(case for case, _ in rows)), list(dict.fromkeys(t for _, row in rows for t in row))


def details(name: str, record: Record) -> Iterator[str]:
    """All of a family's cells; techniques that share a reason share a line."""
    seconds = "not captured" if record.capture_seconds is None else f"captured in {record.capture_seconds} s"
    yield f"{name}: {seconds}; graphs of batches + of one row: {record.counted}; {record.versions}"
    if record.moved:
        yield f"  some layers have no attention: {', '.join(record.moved.values())}"
    if record.alone:
        yield f"  videos are tried without images beside them; with some, the unmodified model raises {record.alone}"
    for case, row in record.cells.items():
        for said, group in groupby(row.items(), key=lambda item: str(item[1])):
            yield f"  {case:9} {', '.join(technique for technique, _ in group)}: {said}"


def counts(families: Mapping[str, Record]) -> dict[str, int]:
    """How many cells have each status."""
    cells = [cell for record in families.values() for row in record.cells.values() for cell in row.values()]
    return {status: sum(cell.status == status for cell in cells) for status in MARKS}
