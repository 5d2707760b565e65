"""HTML that notebooks and browsers show, on dark paper as on light: colours are the page's own, but for one of ours."""

from __future__ import annotations

import functools
import html
from collections.abc import Iterable, Sequence

MARK = "#2a9d8f"
"""The colour of what is kept; it is told from the background and from text on white and on black."""

FAINT = 'fill="currentColor" fill-opacity="0.2"'
"""How what is left out is drawn."""

_CELL = "padding:0.15em 0.9em 0.15em 0;text-align:left;vertical-align:top"
_PLAIN = "background:none;color:inherit;overflow-x:auto"


def escape(text: object) -> str:
    """Text as it is, in HTML and SVG, attributes included."""
    return html.escape(str(text))


def heading(text: str, level: int = 4) -> str:
    """A heading."""
    return f"<h{level} style='color:inherit;margin:0.8em 0 0.3em'>{escape(text)}</h{level}>"


def listing(text: str) -> str:
    """Lines as they are."""
    return f"<pre style='{_PLAIN};margin:0'>{escape(text)}</pre>"


def items(texts: Iterable[str]) -> str:
    """A list."""
    return f"<ul style='margin:0 0 0.5em'>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table."""
    cells = [[f"<th style='{_CELL}'>{escape(x)}</th>" for x in headings]]
    cells += [[f"<td style='{_CELL}'>{escape(x)}</td>" for x in row] for row in rows]
    lines = "".join(f"<tr style='background:none'>{''.join(row)}</tr>" for row in cells)
    return f"<table style='{_PLAIN};border-collapse:collapse'>{lines}</table>"


def folded(title: str, body: str) -> str:
    """What is shown when one asks for it."""
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def bars(title: str, before: Sequence[float], after: Sequence[float], told: Sequence[str]) -> str:
    """A chart, as SVG: for each layer, from left to right, a bar before, faint, and in it one after.

    Args:
        title: what is drawn.
        before, after: for each layer, a number that is not negative.
        told: for each layer, the two in words, which a pointer shows.
    """
    step, tall, line = max(4, min(24, 720 // max(1, len(before)))), 64, 16
    top, parts = max([*before, *after, 1e-300]), []
    for i, (old, new, text) in enumerate(zip(before, after, told, strict=True)):
        drawn = f"<title>layer {i}: {escape(text)}</title>"
        for value, fill in ((old, FAINT), (new, f'fill="{MARK}"')):
            height = tall * value / top
            place = f'x="{i * step}" y="{line + tall - height:.2f}" width="{step - 1}" height="{height:.2f}"'
            drawn += f"<rect {place} {fill}/>"
        parts.append(f"<g>{drawn}</g>")
    last = len(before) - 1
    told_below = f"layers 0 to {last}; faint: before, coloured: after"
    words = [(0, line - 5, title), (0, line + tall + line - 3, told_below)]
    parts += [f'<text x="{x}" y="{y}" fill="currentColor">{escape(text)}</text>' for x, y, text in words]
    return svg(max(step * len(before), 300), tall + 2 * line + 2, "".join(parts))


def svg(width: int, height: int, drawn: str) -> str:
    """A drawing; what it says is in the page's colour."""
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="max-width:100%;height:auto"'
    return f'{start} font-family="sans-serif" font-size="12">{drawn}</svg>'


def document(title: str, body: str) -> str:
    """A whole page that follows the reader's choice of dark or light."""
    head = f'<meta charset="utf-8"><meta name="color-scheme" content="light dark"><title>{escape(title)}</title>'
    return f"<!doctype html><html><head>{head}</head><body style='font-family:sans-serif'>{body}</body></html>\n"


@functools.singledispatch
def html_of(thing: object) -> str:
    """What a notebook shows of a thing: a heading and its text, unless a kind of things has more to show."""
    return heading(type(thing).__name__, 3) + listing(str(thing))


class Shown:
    """Things that a notebook shows by :func:`html_of`."""

    def _repr_html_(self) -> str:
        return f"<div>{html_of(self)}</div>"
