"""Answers and errors of many rows as a file: Parquet, or JSONL where pyarrow is not installed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vlmrewrite.evaluate import write_whole

ANSWERS, ERRORS = "answers", "errors"


def write_rows(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """Rows as Parquet, or as JSONL without pyarrow; the file is there whole or not at all."""
    as_lines, as_table = folder / f"{name}.jsonl", folder / f"{name}.parquet"
    try:
        import pyarrow
        from pyarrow.parquet import write_table
    except ImportError:
        write_whole(as_lines, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        as_table.unlink(missing_ok=True)
        return as_lines
    text = name == ERRORS or any(isinstance(row["id"], str) for row in rows)
    kinds = [("row", pyarrow.int64()), ("id", pyarrow.string() if text else pyarrow.int64())]
    schema = pyarrow.schema([*kinds, ("output" if name == ANSWERS else "error", pyarrow.string())])
    beside = folder / f".{name}.parquet.part"
    rows = [row | {"id": str(row["id"])} if text and row["id"] is not None else row for row in rows]
    write_table(pyarrow.Table.from_pylist(rows, schema=schema), beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(as_table)
    as_lines.unlink(missing_ok=True)
    return as_table
