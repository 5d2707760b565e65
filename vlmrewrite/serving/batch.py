"""A recipe over a file of pictures and prompts: every row is answered once, however often the run is killed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from vlmrewrite.evaluate import (
    Journal,
    Sample,
    Subject,
    each_row,
    groups_of,
    identity_of,
    number_of_rows,
    refuse_chats,
    said,
    sample_of,
    write_whole,
)
from vlmrewrite.hf import base_model_of
from vlmrewrite.ops import Backend, Kernels
from vlmrewrite.serving.actors import on_actors, ray_module

ANSWERS, ERRORS = "answers", "errors"

_HOPELESS = 8
"""Rows that the model fails on before any comes through, and then the run stops."""

Line = dict[str, Any]
"""What came of a row: ``row`` (its place, from 0), ``id``, and ``output`` or ``error``."""

Rows = list[tuple[Line, Sample | None]]
"""Rows that are not done, with the sample of each, or None and the error."""


@dataclass(frozen=True)
class Mapped:
    """What came of a file.

    Attributes:
        answers: the file of answers: columns ``row``, ``id`` and ``output``.
        errors: that of rows that could not be answered: ``row``, ``id`` and ``error``; None if there are none.
        rows: how many rows the input has.
        failed: how many are in ``errors``.
        before: how many were done when this run began.
    """

    answers: Path
    errors: Path | None
    rows: int
    failed: int
    before: int


def map_rows(
    model: Any,
    processor: Any,
    data: str | os.PathLike[str],
    recipe: Any,
    *,
    output: str | os.PathLike[str],
    batch: int = 8,
    max_new_tokens: int = 32,
    backend: Backend = "auto",
    kernels: Kernels = "auto",
    ray: str | None = None,
    actors: int = 1,
    load: Callable[[], tuple[Any, Any]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Mapped:
    """Answer each row of a file under a recipe, greedily, and write the answers to a folder.

    Answers are kept batch by batch. A run that was cut off, at whatever point, goes on behind the last whole batch when
    it is called again with the same input, model, recipe and settings; ``answers`` and ``errors`` are written at the
    end, in the order of the input, as Parquet, or as JSONL where pyarrow is not installed.

    Args:
        model: an unmodified model in eval mode, on any device.
        processor: its, with a tokenizer and an image processor.
        data: path of a ``.jsonl`` or ``.parquet`` file. A row has ``image`` or ``images`` (paths relative to the file,
            bytes) and ``prompt`` or ``messages``, optionally ``id``, as for :func:`vlmrewrite.evaluate`; answers are
            not looked at, and ids need not differ.
        recipe: as :func:`vlmrewrite.apply` takes it; None: the model as it is.
        output: the folder.
        batch: prompts at a time.
        max_new_tokens: of the longest answer.
        backend, kernels: for :func:`vlmrewrite.apply`.
        ray: address of a Ray cluster whose processes answer the rows, ``"local"`` for one of this machine, which is
            started for it; None: this process does. Paths of images, and vlmrewrite, must be there.
        actors: how many processes of the cluster, each of one CPU, and of one GPU if the model is on one.
        load: called in each process of the cluster; returns the same model, in eval mode, and its processor.
        progress: called with the number of rows that are done, and of all.

    Raises:
        ValueError: input, recipe, model or folder cannot be used, or another run writes to the folder.
        FileNotFoundError: there is no such file.
        ImportError: the input is Parquet, and pyarrow is not installed; or Ray is not.
        RuntimeError: the model failed on the first rows, all of them, its device no longer works, or processes of the
            cluster were lost again and again. What was done stays done.
    """
    if batch < 1 or max_new_tokens < 1 or actors < 1:
        got = f"batch={batch}, max_new_tokens={max_new_tokens}, actors={actors}"
        raise ValueError(f"expected numbers of at least 1, got {got}")
    if ray is not None:
        ray_module()
        if load is None:
            raise ValueError(
                "expected load, a function that loads model and processor in each process of Ray, got None"
            )
    base = base_model_of(model)
    if base.training:
        raise ValueError(f"expected a {type(model).__name__} in eval mode, got one in training: call model.eval()")
    source, folder, total = Path(data), Path(output), number_of_rows(data)
    subject = Subject(model, processor, recipe, backend=backend, kernels=kernels)
    about = {"data": _hash_of(source), "rows": total, "recipe": {subject.name: subject.recipe}}
    about |= {"model": identity_of(base), "batch": batch, "max_new_tokens": max_new_tokens}
    about |= {"backend": backend, "kernels": kernels}
    with _alone(folder):
        journal = Journal(folder, about)
        before = len(journal.lines)
        pending = _pending(source, processor, {line["row"] for line in journal.lines})
        batches = iter(lambda: list(islice(pending, batch)), [])
        some_came = any(line["error"] is None for line in journal.lines)
        progress(before, total)
        answered: Iterator[tuple[list[Line], int | None]]
        if ray is None:
            ask = _Asking(subject, max_new_tokens, some_came).ask
            answered = ((ask(some), None) for some in batches)
        else:
            gpus = int(base.device.type == "cuda")
            given = load, about["model"], recipe, backend, kernels, max_new_tokens, some_came
            answered = on_actors(_asking, given, batches, address=ray, actors=actors, gpus=gpus)
        for lines, process in answered:
            journal.add(lines, {"rows": len(lines), "process": process})
            progress(len(journal.lines), total)
        return _finished(folder, journal.lines, before)


def _pending(source: Path, processor: Any, done: set[int]) -> Iterator[tuple[Line, Sample | None]]:
    """The rows of a file that are not done; a sample's id is the row's place, which no other row has."""
    for i, (where, row) in enumerate(each_row(source)):
        if i in done:
            continue
        line: Line = {"row": i, "id": None, "output": None, "error": None}
        sample = None
        try:
            sample = sample_of(row, i, source.parent, references=False)
            line["id"] = sample.id
            refuse_chats(processor, [sample])
            sample = replace(sample, id=i)
        except ValueError as e:
            sample, line["error"] = None, f"{where}: {e}"
        yield line, sample


class _Asking:
    """Asks a model a batch; where that fails, row by row."""

    def __init__(self, subject: Subject, longest: int, answered: bool) -> None:
        self.subject, self.longest, self.answered, self.failed = subject, longest, answered, 0

    def ask(self, rows: Rows) -> list[Line]:
        """The lines of some rows.

        Raises:
            RuntimeError: nothing but failures has come of the model so far, and these are many; or its device fails.
        """
        samples = [sample for _, sample in rows if sample is not None]
        groups, errors = groups_of(self.subject.processor, samples) if samples else ([], {})
        found: dict[Any, str] = {}
        for some, inputs in groups:
            self._answer(some, inputs, found, errors)
        for line, sample in rows:
            if sample is not None:
                line |= {"output": found.get(sample.id), "error": errors.get(sample.id)}
        return [line for line, _ in rows]

    def _answer(self, samples: Iterable[Sample], inputs: Any, found: dict[Any, str], errors: dict[Any, str]) -> None:
        samples, why = list(samples), ""
        try:
            made = self.subject.generate(inputs, self.longest)
        except Exception as e:
            why = said(e)  # not the error itself, which holds what the failed call held
        if not why:
            for i, sample in enumerate(samples):
                if no_numbers := made.no_numbers(i):
                    errors[sample.id] = no_numbers
                    continue
                found[sample.id], self.answered = made.outputs[i], True
            return
        torch.ones(1, device=self.subject.base.device).item()  # a device that has failed goes on failing: raises
        if len(samples) > 1:
            for sample in samples:
                groups, wrong = groups_of(self.subject.processor, [sample])
                errors |= wrong
                for some, alone in groups:
                    self._answer(some, alone, found, errors)
            return
        errors[samples[0].id] = why
        self.failed += 1
        if not self.answered and self.failed >= _HOPELESS:
            raise RuntimeError(f"the model failed on all of the first {self.failed} rows: {why}")


def _asking(
    load: Callable[[], tuple[Any, Any]], same: Any, recipe: Any, backend: Backend, kernels: Kernels, *how: Any
) -> Callable[[Rows], list[Line]]:
    """What asks a model that is loaded for it, in a process of its own."""
    model, processor = load()
    if (found := identity_of(base_model_of(model))) != same:
        raise ValueError(f"load: expected the model that the run is of, {same}, got {found}")
    return _Asking(Subject(model, processor, recipe, backend=backend, kernels=kernels), *how).ask


class _alone:
    """While the block runs, no other run writes to a folder."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder}: expected a folder, or nothing, got a file")
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


def _finished(folder: Path, lines: list[Line], before: int) -> Mapped:
    """Write what came of all rows, in their order."""
    lines = sorted(lines, key=lambda line: line["row"])
    if any(isinstance(line["id"], str) for line in lines):
        lines = [line | {"id": None if line["id"] is None else str(line["id"])} for line in lines]
    good, bad = ([line for line in lines if (line["error"] is None) is right] for right in (True, False))
    answers = _write(folder, ANSWERS, [{key: line[key] for key in ("row", "id", "output")} for line in good])
    errors = [{key: line[key] for key in ("row", "id", "error")} for line in bad]
    return Mapped(answers, _write(folder, ERRORS, errors) if bad else None, len(lines), len(bad), before)


def _write(folder: Path, name: str, rows: list[Line]) -> Path:
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


def _hash_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
