"""A run on disk: what it is of, and what is done, so that one that was cut off goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from vlmrewrite.errors import shown
from vlmrewrite.evaluate.together import Together

ABOUT, SAMPLES, PROGRESS, RESULTS, PAGE = "run.json", "samples.jsonl", "progress.jsonl", "results.json", "report.html"


def _check(folder: Path) -> None:
    """Raise ValueError for a folder that is none, or holds files of something else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, or nothing, got a file")
    for name in () if (folder / ABOUT).is_file() else (SAMPLES, PROGRESS, RESULTS, PAGE):
        if (folder / name).exists():
            raise ValueError(f"{folder}: expected an empty folder or one with {ABOUT}, got one with {name} alone")


class alone:
    """While the block runs, no other run writes to a folder, which is made if there is none.

    Raises:
        ValueError: another one does, or the folder holds files of something else.
    """

    def __init__(self, folder: Path) -> None:
        _check(folder)
        self.folder = folder

    def __enter__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self.lock.acquire()
        except Timeout:
            raise ValueError(f"{self.folder}: another run is writing to it; expected a folder of its own") from None

    def __exit__(self, *_: object) -> None:
        self.lock.release()


class Journal:
    """Batches that are done: their samples in ``samples.jsonl``, what they cost in ``progress.jsonl``.

    A batch is done once its line in ``progress.jsonl`` is whole. That line says how long ``samples.jsonl`` was then,
    and what stands behind it is cut off when the run goes on.
    """

    def __init__(self, folder: Path | None, about: dict[str, Any]) -> None:
        """Open a folder, which is made, or go on with the run that it holds.

        Args:
            folder: None keeps nothing on disk.
            about: plain values that say what the run is of; all must be the same for a run to go on.

        Raises:
            ValueError: the folder holds another run, or files of something else. Nothing is changed.
        """
        self.folder, self.lines, self.batches = folder, list[dict[str, Any]](), list[dict[str, Any]]()
        if folder is None:
            return
        about = json.loads(json.dumps(about))
        _check(folder)
        if (folder / ABOUT).is_file():
            self._resume(folder, about)
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ABOUT, json.dumps(about, indent=1) + "\n")

    def _resume(self, folder: Path, about: dict[str, Any]) -> None:
        try:
            before = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        except ValueError as e:
            raise ValueError(f"{folder / ABOUT}: expected JSON: {e}") from None
        if other := [key for key in about if before.get(key) != about[key]]:
            said = "; ".join(f"{key}: {shown(before.get(key))}, now {shown(about[key])}" for key in other)
            raise ValueError(
                f"{folder}: holds a run that differs in {', '.join(other)}: give another --output folder, or the same"
                f" options ({said})"
            )
        self.batches = whole_lines(folder / PROGRESS)
        size = self.batches[-1]["bytes"] if self.batches else 0
        there = (folder / SAMPLES).stat().st_size if (folder / SAMPLES).exists() else 0
        if there < size:
            raise ValueError(
                f"{folder / SAMPLES}: expected at least {size} bytes, as {PROGRESS} says, got {there}: the folder was"
                " changed; give another one"
            )
        for name, length in ((SAMPLES, size), (PROGRESS, sum(len(_line(x)) for x in self.batches))):
            if (folder / name).exists():
                os.truncate(folder / name, length)
        self.lines = whole_lines(folder / SAMPLES)

    def add(self, lines: list[dict[str, Any]], batch: dict[str, Any]) -> None:
        """A batch is done: its samples, and what else there is to tell."""
        if self.folder is not None:
            size = _append(self.folder / SAMPLES, b"".join(map(_line, lines)))
            batch = batch | {"bytes": size}
            _append(self.folder / PROGRESS, _line(batch))
        self.lines += lines
        self.batches.append(batch)


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of JSON of a file, without a last one that is cut off; none if there is no file."""
    if not path.exists():
        return []
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    try:
        return [json.loads(line) for line in lines]
    except ValueError as e:
        raise ValueError(f"{path}: expected lines of JSON: {e}; give another folder") from None


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whenever the process ends."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def _append(path: Path, data: bytes) -> int:
    """Add to a file, to the disk; returns how long it is then."""
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def opened(folder: Path | None, about: dict[str, Any], together: Together) -> Journal:
    """A journal for several processes: the first one keeps it on disk, the others in memory, as it was found there.

    Raises:
        ValueError: as :class:`Journal`, in the first process; RuntimeError in the others.
    """
    journal = cast(Journal, together.each(lambda: None if together.rank else Journal(folder, about))[0])
    journal.folder = None if together.rank else folder
    return journal
