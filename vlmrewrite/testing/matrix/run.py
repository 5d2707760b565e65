"""Families measured in processes of their own: one that dies or hangs costs its own cells, and no other's."""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from vlmrewrite.testing.matrix.cells import Cell, Record, of_error

TIMEOUT = 300.0
"""Seconds that a family may take."""

_ORPHANED = 255
"""What multiprocessing gives for an exit code that it could not learn."""

_FORKS = multiprocessing.get_context("forkserver")


def run(
    names: Sequence[str], *, jobs: int = 1, timeout: float = TIMEOUT, measure: Callable[[str], Any] | None = None
) -> Iterator[tuple[str, Record]]:
    """Measure families; each comes when it is ready.

    Args:
        names: of families in :data:`vlmrewrite.testing.models.ZOO`.
        jobs: how many are measured at a time.
        timeout: seconds for each.
        measure: in place of :func:`vlmrewrite.testing.matrix.measure.measure`; a function of a module.

    Yields:
        name and record. Cells that were not reached are failed, with the reason.
    """
    _FORKS.set_forkserver_preload(["vlmrewrite.testing.matrix.measure"])
    with ThreadPoolExecutor(jobs) as pool:
        tasks = {pool.submit(_one, name, timeout, measure): name for name in names}
        for task in as_completed(tasks):
            yield tasks[task], task.result()


def _one(name: str, timeout: float, measure: Callable[[str], Any] | None) -> Record:
    """One family, in a process of its own; again if the process that all of them are forked from was killed."""
    record, code = _attempt(name, timeout, measure)
    return _attempt(name, timeout, measure)[0] if code == _ORPHANED else record


def _attempt(name: str, timeout: float, measure: Callable[[str], Any] | None) -> tuple[Record, int | None]:
    """A record and the exit code of the process that measured it."""
    from vlmrewrite.testing.matrix.cases import CASES, TECHNIQUES

    record, end, wrong = Record(), time.monotonic() + timeout, ""
    here, there = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_child, args=(there, name, measure))
    process.start()
    there.close()
    try:
        while not wrong:
            if not here.poll(max(0.0, end - time.monotonic())):
                wrong = f"not reached: {timeout:g} seconds were over"
                break
            try:
                field, value = here.recv()
            except EOFError:
                break
            if field == "cell":
                case, technique, cell = value
                record.cells.setdefault(case, {})[technique] = cell
            elif field == "error":
                wrong = value.reason
            else:
                setattr(record, field, value)
    finally:
        if wrong:
            process.kill()
        process.join()
    wrong = wrong or f"not reached: the process ended with {_ending(process.exitcode)}"
    for case in CASES:
        row = record.cells.setdefault(case, {})
        row |= {technique: Cell("failed", reason=wrong) for technique in TECHNIQUES if technique not in row}
    return record, process.exitcode


def _ending(code: int | None) -> str:
    """An exit code in words."""
    return f"exit code {code}" if code is None or code >= 0 else signal.Signals(-code).name


def _child(pipe: Any, name: str, measure: Callable[[str], Any] | None) -> None:
    import warnings

    import torch

    from vlmrewrite.testing.matrix import measure as own

    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    try:
        for piece in (measure or own.measure)(name):
            pipe.send(piece)
    except Exception as e:
        pipe.send(("error", of_error(e)))
