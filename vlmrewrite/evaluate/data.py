"""Samples: what a model is asked about pictures, and what is right. From JSONL, Parquet, or rows in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vlmrewrite.errors import shown
from vlmrewrite.evaluate.rows import Json, sample_of
from vlmrewrite.evaluate.sample import Sample

_ROWS = 256
"""Rows of a Parquet file that are read at a time."""

_SHOWN = 20
"""Faulty rows that are told one by one; of more, how many there are."""


def read_data(data: Any) -> list[Sample]:
    """Samples from a file or from rows.

    Args:
        data: path of a ``.jsonl`` or ``.parquet`` file, or rows: mappings (a ``datasets.Dataset`` gives such), or
            samples. A row has ``image`` or ``images`` (paths relative to the file, ``file:`` and ``data:`` URLs, bytes,
            PIL images, or mappings with ``bytes`` or ``path``), ``prompt`` or ``messages``, and ``answer``, or
            ``answers``, or ``choices`` with ``answer`` (the option, its letter, or its place from 0), or none of these
            in all rows; optionally ``kind`` and ``id``. Whatever else it has is left aside.

    Raises:
        ValueError: rows cannot be used: one line each, at most 20.
        FileNotFoundError: there is no such file.
        ImportError: Parquet without pyarrow.
        TypeError: it is none of these.
    """
    samples, problems, places = list[Sample](), list[str](), dict[str | int, str]()
    folder = Path(data).parent if isinstance(data, str | os.PathLike) else Path()
    for i, (where, row) in enumerate(each_row(data)):
        try:
            sample = row if isinstance(row, Sample) else sample_of(row, i, folder)
            if sample.id in places:
                raise ValueError(f"id: expected one of its own, got {sample.id!r}, which {places[sample.id]} has")
        except ValueError as e:
            problems.append(f"{where}: {e}")
            continue
        places[sample.id] = where
        samples.append(sample)
    known = [s for s in samples if s.answers]
    if known and len(known) < len(samples):
        bare = [places[s.id] for s in samples if not s.answers]
        problems += [f"{where}: expected an 'answer', as other rows have, got none" for where in bare]
    if problems:
        more = [f"and {len(problems) - _SHOWN} more rows that cannot be used"] * (len(problems) > _SHOWN)
        raise ValueError("\n".join(problems[:_SHOWN] + more))
    if not samples:
        name = f"{os.fspath(data)}, which holds none" if isinstance(data, str | os.PathLike) else shown(data)
        raise ValueError(f"expected at least one sample, got none from {name}")
    return samples


def fingerprint(samples: Iterable[Sample]) -> str:
    """A hash of all that samples hold, pixels or files of images included."""
    digest = hashlib.sha256()
    for s in samples:
        digest.update(repr((s.id, s.prompt, s.messages, s.answers, s.choices, s.kind)).encode())
        for image in s.images:
            whole = image if isinstance(image, bytes) else image.read_bytes() if isinstance(image, Path) else None
            digest.update(hashlib.sha256(image.tobytes() if whole is None else whole).digest())
    return digest.hexdigest()


def each_row(data: Any) -> Iterator[tuple[str, Any]]:
    """Rows of a file or in memory, one after the other, with what each is called in an error.

    Raises:
        ValueError, FileNotFoundError, ImportError, TypeError: as :func:`read_data`, where the file cannot be read.
    """
    if isinstance(data, str | os.PathLike):
        path = Path(data)
        if not path.is_file():
            raise FileNotFoundError(f"expected a file with data, got {os.fspath(data)!r}, which is not a file")
        if path.suffix == ".parquet":
            yield from ((f"{path} row {i}", row) for i, row in enumerate(_parquet(path)))
            return
        if path.suffix not in (".jsonl", ".json", ".ndjson"):
            raise ValueError(f"{path}: expected a file that ends in .jsonl or .parquet")
        yield from _lines(path)
    elif isinstance(data, Iterable) and not isinstance(data, Mapping | bytes):
        yield from ((f"data[{i}]", row) for i, row in enumerate(data))
    else:
        raise TypeError(f"expected the path of a .jsonl or .parquet file, or rows, got {shown(data)}")


def _lines(path: Path) -> Iterator[tuple[str, Json]]:
    """Lines that are not empty, and what each is called."""
    with path.open(encoding="utf-8-sig") as file:
        try:
            for i, line in enumerate(file, 1):
                if i == 1 and line.lstrip().startswith("["):
                    raise ValueError(
                        f"{path}: expected JSON Lines, a mapping in each line, got a list: write a row a line"
                    )
                if line.strip():
                    yield f"{path} line {i}", Json(line)
        except UnicodeDecodeError as e:
            raise ValueError(f"{path}: expected text in UTF-8: {e}") from None


def number_of_rows(data: Any) -> int:
    """How many rows :func:`each_row` gives; it raises what that does."""
    if not isinstance(data, str | os.PathLike) or Path(data).suffix != ".parquet" or not Path(data).is_file():
        return sum(1 for _ in each_row(data))
    with _opened(Path(data)) as file:
        rows: int = file.metadata.num_rows
    return rows


def _parquet(path: Path) -> Iterator[Any]:
    """Rows of a file, of which only some are in memory at a time."""
    with _opened(path) as file:
        try:
            for rows in file.iter_batches(batch_size=_ROWS):
                yield from rows.to_pylist()
        except (OSError, ValueError) as e:  # what pyarrow raises
            raise ValueError(f"{path}: expected a Parquet file that is whole: {e}") from e


def _opened(path: Path) -> Any:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as e:
        raise ImportError(f"{path}: Parquet needs pyarrow, which is not installed: pip install pyarrow") from e
    try:
        return ParquetFile(path)
    except Exception as e:
        raise ValueError(f"{path}: expected a Parquet file: {e}") from e
