"""Scripts run in this process: what they import is there, and importing it again takes longer than they do."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def _as_called(folder: Path, arguments: list[str]) -> Iterator[io.StringIO]:
    """The process as a script finds its own; what it prints."""
    before, threads, out = (sys.argv, [*sys.path], {*sys.modules}), torch.get_num_threads(), io.StringIO()
    sys.argv, sys.path = arguments, [str(folder), *sys.path]
    try:
        with contextlib.ExitStack() as stack:
            for context in (torch.random.fork_rng(), contextlib.chdir(folder), contextlib.redirect_stdout(out)):
                stack.enter_context(context)
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            yield out
    finally:
        sys.argv, sys.path = before[:2]
        torch.set_num_threads(threads)
        for name in {*sys.modules} - before[2]:
            if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                del sys.modules[name]  # found there alone


def run(folder: Path, *arguments: object) -> str:
    """What a script of a folder prints.

    Args:
        folder: where it runs.
        arguments: its file, or ``-m`` and its module; then its own.

    Raises:
        AssertionError: it ends with a status that is not 0.
    """
    first, *rest = map(str, arguments)
    name, rest = (rest[0], rest[1:]) if first == "-m" else (first, rest)
    with _as_called(folder, [name, *rest]) as out:
        try:
            if first == "-m":
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(str(folder / name), run_name="__main__")
        except SystemExit as e:
            if e.code:
                raise AssertionError(f"{out.getvalue()}\nended with {e.code}") from e
    return out.getvalue()
