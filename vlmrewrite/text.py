"""Small pieces of text for listings and reports."""

from __future__ import annotations

import textwrap

WIDTH = 80
"""Columns of a terminal, if nobody says otherwise."""


def span(layers: list[int]) -> str:
    """A run of layers, such as 0-15."""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def byte_size(n: float) -> str:
    """Bytes in a unit that suits."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def wrapped(text: str, indent: str, width: int = WIDTH) -> list[str]:
    """A line, folded where it is longer than ``width``; what follows is indented. Words stay whole."""
    return textwrap.wrap(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False) or [""]


def table(rows: list[list[str]], width: int | None = None, fold: int = 0) -> list[str]:
    """Rows of cells as aligned lines.

    Args:
        rows: as many cells in each.
        width: of a line at most, if that can be had by folding the cells of one column.
        fold: which column.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    if width is not None and (over := sum(widths) + 2 * len(widths) - 2 - width) > 0:
        widths[fold] = max(12, widths[fold] - over)
        folded = [wrapped(row[fold], "  ", widths[fold]) for row in rows]
        rows = [
            [*row[:fold], text, *row[fold + 1 :]] if i == 0 else [*[""] * fold, text, *[""] * (len(row) - fold - 1)]
            for row, texts in zip(rows, folded, strict=True)
            for i, text in enumerate(texts)
        ]
        return table(rows)
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
