"""What the command line prints: tables, JSON, and every refusal as a line that starts with ``error:``."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

_REFUSALS = (ValueError, TypeError, OSError, ImportError, NotImplementedError, RuntimeError)

_USAGE: Any = typer.BadParameter.__mro__[1]  # UsageError, which typer does not export

_LONGEST = 1000  # characters of an error line


class Errors(ValueError):
    """Several things that are wrong, one a line."""


class Commands(TyperGroup):
    """Commands that end a refusal with the exit code 2 and, on stderr, the reason without a traceback.

    Warnings are lines of their own there.
    """

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run a command and, unless ``standalone_mode=False`` is given, end the process."""
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print_warning(str(message))
            return self._main(*args, **extra)

    def _main(self, *args: Any, **extra: Any) -> Any:
        ends, extra["standalone_mode"] = extra.get("standalone_mode", True), False
        if not ends:
            return super().main(*args, **extra)
        try:
            sys.exit(super().main(*args, **extra) or 0)
        except typer.Abort:
            sys.exit(130)
        except Errors as e:
            lines = str(e).splitlines()
        except _USAGE as e:
            lines = [e.format_message()]
        except _REFUSALS as e:
            notes = [note.partition("\n")[0].removesuffix(", on the plan:") for note in getattr(e, "__notes__", ())]
            lines = [" ".join([str(e) or type(e).__name__, *(f"({note})" for note in notes)])]
        for line in lines:
            print("error:", _one_line(line), file=sys.stderr)
        sys.exit(2)


def print_warning(text: str) -> None:
    """On stderr, in one line."""
    print("warning:", _one_line(text), file=sys.stderr)


def check_json(path: Path | None) -> None:
    """Raise ValueError, before anything is measured, if ``--json`` names a file that cannot be written."""
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"--json: expected - or a file in a folder that exists, got {str(path)!r}")
    if path is not None and path.is_dir():
        raise ValueError(f"--json: expected - or a file, got the folder {str(path)!r}")


def as_json(path: Path | None, data: object) -> bool:
    """What ``--json`` asks for: plain values, indented, to a file, or for ``-`` to stdout.

    Returns:
        whether they were printed, and text is not to be.
    """
    if path is None:
        return False
    text = json.dumps(data, indent=2)
    if str(path) == "-":
        print(text)
        return True
    path.write_text(text + "\n", encoding="utf-8")
    return False


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Cells as they are; long ones are folded, but for those of the first column."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    for i, heading in enumerate(headings):
        table.add_column(heading, overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def print_wrapped(text: str, indent: str) -> None:
    """A line, folded at the terminal's width; what follows is indented."""
    width = shutil.get_terminal_size().columns
    print(textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False))


def folded(cell: str) -> str:
    """A cell in several lines, so that the table is no wider than a terminal."""
    for wide, narrow in ((" (", "\n"), (")", ""), (" to ", "..\n"), ("prefill", "pre-\nfill"), ("decode", "de-\ncode")):
        cell = cell.replace(wide, narrow)
    return re.sub(r" (?=.?i?B$)", "\n", cell)  # before a unit


@contextlib.contextmanager
def warnings_later() -> Iterator[None]:
    """Each warning of the block once, behind it; not between, where a bar is drawn, and none if the block fails."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
        print_warning(message)


def print_failures(failures: Iterable[Mapping[str, Any]]) -> None:
    """The samples on which a model failed."""
    for failure in failures:
        print_warning(f"sample {failure['id']!r} failed under {failure['recipe']}: {failure['error']}")


@contextlib.contextmanager
def a_line_each() -> Iterator[None]:
    """Errors of several lines are as many errors."""
    try:
        yield
    except ValueError as e:
        if "\n" in str(e):
            raise Errors(str(e)) from e
        raise


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _LONGEST else flat[: _LONGEST - 3] + "..."
