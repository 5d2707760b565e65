"""A recipe over a file of pictures and prompts: every row is answered once, however often the run is killed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from vlmrewrite.evaluate import (
    Journal,
    Sample,
    Subject,
    alone,
    check_counts,
    each_row,
    groups_of,
    id_of,
    identity_of,
    number_of_rows,
    refuse_chats,
    said,
    sample_of,
)
from vlmrewrite.hf import base_model_of
from vlmrewrite.ops import Backend, Kernels
from vlmrewrite.serving.actors import on_actors, ray_module
from vlmrewrite.serving.table import ANSWERS, ERRORS, write_rows

_HOPELESS = 8
"""Rows that the model fails on before any comes through, in whatever processes, and then the run stops."""

Line = dict[str, Any]
"""What came of a row: ``row`` (its place, from 0), ``id``, and ``output`` or ``error``."""

Rows = list[tuple[Line, Sample | None]]
"""Rows that are not done, with the sample of each, or None and the error."""

Made = tuple[list[Line], list[str]]
"""The lines of some rows, and what the model said where it failed on one of them."""


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
        RuntimeError: the model failed on the first rows, all of them (they are asked again when the run goes on), its
            device no longer works, or processes of the cluster were lost again and again. What was done stays done.
    """
    check_counts(batch=batch, max_new_tokens=max_new_tokens, actors=actors)
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
    subject.try_size()
    about = {"data": _hash_of(source), "rows": total, "recipe": {subject.name: subject.recipe}}
    about |= {"model": identity_of(base), "batch": batch, "max_new_tokens": max_new_tokens}
    about |= {"backend": backend, "kernels": kernels}
    with alone(folder):
        journal = Journal(folder, about)
        before = len(journal.lines)
        pending = _pending(source, processor, {line["row"] for line in journal.lines})
        batches = iter(lambda: list(islice(pending, batch)), [])
        some_came = any(line["error"] is None for line in journal.lines)
        progress(before, total)
        made: Generator[tuple[Made, int | None]]
        if ray is None:
            ask = _Asking(subject, max_new_tokens).ask
            made = ((ask(some), None) for some in batches)
        else:
            gpus = int(base.device.type == "cuda")
            given = load, about["model"], recipe, backend, kernels, max_new_tokens
            made = on_actors(_asking, given, batches, address=ray, actors=actors, gpus=gpus)
        with closing(made):
            for lines, process in _hopeful(made, some_came):
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
            sample, line["id"], line["error"] = None, id_of(row), f"{where}: {e}"
        yield line, sample


def _hopeful(made: Iterable[tuple[Made, int | None]], some_came: bool) -> Iterator[tuple[list[Line], int | None]]:
    """Batches in turn; those that the model failed on wait until it has answered a row, or all are done.

    Raises:
        RuntimeError: it has answered none, and failed on many. Nothing of those that waited is kept: they are asked
            again when the run goes on.
    """
    waiting, failed = list[tuple[list[Line], int | None]](), 0
    for (lines, errors), process in made:
        waiting.append((lines, process))
        failed, some_came = failed + len(errors), some_came or any(line["error"] is None for line in lines)
        if not some_came and failed >= _HOPELESS:
            raise RuntimeError(f"the model failed on all of the first {failed} rows: {errors[-1]}")
        if some_came or not failed:
            yield from waiting
            waiting.clear()
    yield from waiting


class _Asking:
    """Asks a model a batch; where that fails, row by row."""

    def __init__(self, subject: Subject, longest: int) -> None:
        self.subject, self.longest, self.failed = subject, longest, list[str]()

    def ask(self, rows: Rows) -> Made:
        """The lines of some rows, and what the model said where it failed.

        Raises:
            RuntimeError: its device fails.
        """
        samples = [sample for _, sample in rows if sample is not None]
        groups, errors = groups_of(self.subject.processor, samples) if samples else ([], {})
        found, self.failed = dict[Any, str](), []
        for some, inputs in groups:
            self._answer(some, inputs, found, errors)
        for line, sample in rows:
            if sample is not None:
                line |= {"output": found.get(sample.id), "error": errors.get(sample.id)}
        return [line for line, _ in rows], self.failed

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
                found[sample.id] = made.outputs[i]
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
        self.failed.append(why)


def _asking(
    load: Callable[[], tuple[Any, Any]], same: Any, recipe: Any, backend: Backend, kernels: Kernels, longest: int
) -> Callable[[Rows], Made]:
    """What asks a model that is loaded for it, in a process of its own."""
    model, processor = load()
    if (found := identity_of(base_model_of(model))) != same:
        raise ValueError(f"load: expected the model that the run is of, {same}, got {found}")
    return _Asking(Subject(model, processor, recipe, backend=backend, kernels=kernels), longest).ask


def _finished(folder: Path, lines: list[Line], before: int) -> Mapped:
    """Write what came of all rows, in their order."""
    lines = sorted(lines, key=lambda line: line["row"])
    if any(isinstance(line["id"], str) for line in lines):
        lines = [line | {"id": None if line["id"] is None else str(line["id"])} for line in lines]
    good, bad = ([line for line in lines if (line["error"] is None) is right] for right in (True, False))
    answers = write_rows(folder, ANSWERS, [{key: line[key] for key in ("row", "id", "output")} for line in good])
    errors = [{key: line[key] for key in ("row", "id", "error")} for line in bad]
    return Mapped(answers, write_rows(folder, ERRORS, errors) if bad else None, len(lines), len(bad), before)


def _hash_of(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
