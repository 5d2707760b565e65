"""What is wrong with what a user gave, as one line each: where, the value, and what was expected."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError


class CaptureError(RuntimeError):
    """A model's forward could not be captured as one graph: in one line why, where, and what was expected.

    Attributes:
        details: all that the compiler's front end says of it, with the stack of source lines.
    """

    def __init__(self, message: str, details: str) -> None:
        super().__init__(message)
        self.details = details


def explain(error: ValidationError, where: str, fields: Sequence[str]) -> list[str]:
    """One line for each thing that is wrong, such as `Stride.keep: expected an int >= 1 ..., got 0`.

    Args:
        error: what pydantic raised for a class or a mapping.
        where: what the lines start with: the class, or the path to the mapping.
        fields: the fields of the class, in order.
    """
    return [_explain_one(dict(one), where, fields) for one in error.errors(include_url=False)]


def one_of(value: str, expected: Iterable[str]) -> str:
    """`expected one of a, b (did you mean 'a'?)`, for a value that is not among the expected ones."""
    names = list(expected)
    alike = {plain_name(name): name for name in names}
    close = difflib.get_close_matches(plain_name(value), alike, n=1)
    meant = f" (did you mean {alike[close[0]]!r}?)" if close else ""
    return f"expected one of {', '.join(names) or '(nothing)'}{meant}"


def plain_name(name: str) -> str:
    """A name without what one easily gets wrong of it: case, and ``_`` for ``-``."""
    return name.casefold().replace("_", "-")


def shown(value: object) -> str:
    """The value as Python writes it, cut after 80 characters, with its type unless it is a number or None."""
    text = repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return text if type(value) in (int, float, type(None)) else f"{text} ({type(value).__name__})"


def _explain_one(error: dict[str, Any], where: str, fields: Sequence[str]) -> str:
    kind, path = error["type"], list(error["loc"])
    if kind == "unexpected_positional_argument":
        return (
            f"{where}: expected at most {len(fields)} arguments ({', '.join(fields)}), got one more: {error['input']!r}"
        )
    if kind == "invalid_key":
        return f"{where or 'keys'}: expected some of {', '.join(fields)}, got {shown(path[-1])}"
    if path and isinstance(path[0], int):
        path[0] = fields[path[0]]
    at = where + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    at = at.removeprefix(".") + ": " if at else ""
    if kind in ("missing", "missing_argument"):
        return f"{at}required, but missing"
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{at}unknown key, {one_of(str(path[-1]), fields)}" if len(path) == 1 else f"{at}unknown key"
    if kind == "value_error":
        return f"{at}{error['ctx']['error']}"
    expected = error["msg"].replace("Input should be", "expected")
    return f"{at}{expected[:1].lower()}{expected[1:]}, got {shown(error['input'])}"


@contextlib.contextmanager
def noted(notes: Callable[[str], Iterable[str]]) -> Iterator[None]:
    """Adds notes to whatever error leaves the block: what ``notes`` makes of its text and the notes that it has."""
    try:
        yield
    except Exception as e:
        for note in notes("\n".join([str(e), *getattr(e, "__notes__", ())])):
            e.add_note(note)
        raise


@contextlib.contextmanager
def blamed_on(path: Path, what: str) -> Iterator[None]:
    """Makes a ValueError that names the user's file of whatever library code raises over it."""
    try:
        yield
    except Exception as e:
        raise ValueError(f"{path}: {what} cannot be used: {type(e).__name__}: {e}") from e
