"""Which vision tokens each run of layers worked on, as a picture: images, and videos as strips of frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from vlmrewrite import hf
from vlmrewrite.markup import FAINT, MARK, escape, svg
from vlmrewrite.runtime import LastCall
from vlmrewrite.text import span

_ROWS = 8
"""Rows of the batch that are drawn at most."""

_SIDE, _WIDTH, _GAP, _LINE = 96, 960, 6, 16
"""Pixels: of a frame's longer side, of the picture, between frames, of a line of text."""


@dataclass(frozen=True)
class KeptTokens:
    """What the picture shows of a call.

    Attributes:
        names: of each image, or video, as ``row 0, video 1``.
        frames: of each of them, rows and columns of the tokens of each frame, in row-major order.
        stages: of each run of layers, what it is called, and a byte for each vision token, 1 if it is kept.
        unknown: why rows and columns are not known, or None. Then a frame is drawn as a square that may lack some
            cells, and says how many tokens are kept, not where they lie.
        sizes: tokens of each frame of each image or video.
    """

    names: tuple[str, ...]
    frames: tuple[tuple[tuple[int, int], ...], ...]
    stages: tuple[tuple[str, bytes], ...]
    unknown: str | None
    sizes: tuple[tuple[int, ...], ...]

    def svg(self) -> str:
        """The picture; the first rows of a large batch."""
        drawing, shown = _Drawing(), sum(int(name.split()[1].rstrip(",")) < _ROWS for name in self.names)
        drawing.say("coloured: the layers work on it, faint: they do not")
        for title, kept in self.stages:
            drawing.say(f"{title}: {sum(kept)} of {len(kept)} vision tokens", bold=True)
            tokens = iter(kept)
            for name, grids, sizes in islice(zip(self.names, self.frames, self.sizes, strict=True), shown):
                drawing.say(name if len(sizes) == 1 else f"{name}, {len(sizes)} frames")
                drawing.strip([(grid, [*islice(tokens, n)]) for grid, n in zip(grids, sizes, strict=True)])
        if shown < len(self.names):
            drawing.say(f"{len(self.names) - shown} more images or videos, of rows from {_ROWS} on")
        if self.unknown is not None:
            drawing.say(f"tokens in order, not where they lie: {self.unknown}")
        return drawing.svg()


def kept_picture(model: Any, last: LastCall) -> KeptTokens:
    """What the picture shows of the last call with an image of a model."""
    call, counts = last.call, last.call.counts
    sizes = last.given.sizes
    given = counts.each, counts.are_videos, counts.rows, len(call.vision), sizes, call.picked
    known = hf.frame_grids(model.config, *given, hf.learned_queries(model))
    squares = [(-(-n // side), side) for n in counts.sizes("frame") for side in [math.ceil(math.sqrt(n))]]
    each = iter(squares if isinstance(known, str) else known)
    kinds = zip(counts.rows, counts.are_videos, counts.ordinals, strict=True)
    return KeptTokens(
        tuple(f"row {row}, {'video' if video else 'image'} {n}" for row, video, n in kinds),
        tuple(tuple(islice(each, len(frames))) for frames in counts.each),
        tuple(
            (f"{_layers(s.layers)}, {s.name}", bytes(s.vision.flatten()[call.flat].cpu().tolist()))
            for s in last.stages()
        ),
        known if isinstance(known, str) else None,
        counts.each,
    )


def _layers(layers: Sequence[int]) -> str:
    runs = [[i for _, i in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(span, runs))}"


class _Drawing:
    """Lines of text and strips of frames, one below the other."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.at = 0

    def say(self, text: str, bold: bool = False) -> None:
        self.at += _LINE + bold * _GAP
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(f'<text x="0" y="{self.at - 4}" fill="currentColor"{weight}>{escape(text)}</text>')

    def strip(self, frames: Sequence[tuple[tuple[int, int], list[int]]]) -> None:
        """Frames from left to right, in as many lines as they need."""
        x = tallest = 0
        for number, ((rows, columns), kept) in enumerate(frames):
            cell = max(1, _SIDE // max(rows, columns))
            width, height = cell * columns, cell * rows
            if x and x + width > _WIDTH:
                self.at, x, tallest = self.at + tallest + _GAP, 0, 0
            told = f"frame {number}: {sum(kept)} of {len(kept)} tokens"
            dark, light = (_runs(kept, columns, cell, which) for which in (1, 0))
            self.parts.append(
                f'<g transform="translate({x} {self.at})"><title>{told}</title>'
                f'<path d="{light}" {FAINT}/><path d="{dark}" fill="{MARK}"/></g>'
            )
            x, tallest = x + width + _GAP, max(tallest, height)
        self.at += tallest + _GAP

    def svg(self) -> str:
        return svg(_WIDTH, self.at + 4, "".join(self.parts))


def _runs(kept: Sequence[int], columns: int, cell: int, which: int) -> str:
    """Rectangles over neighbours in a row that are all kept, or all dropped; cells have a thin border if they can."""
    line, found = int(cell > 3), []
    for number, row in enumerate(kept[i : i + columns] for i in range(0, len(kept), columns)):
        at = 0
        for value, group in groupby(row):
            n = len([*group])
            cells = [(at + i, 1) for i in range(n)] if line else [(at, n)]
            for start, many in cells if value == which else ():
                side = cell - line
                found.append(f"M{start * cell} {number * cell}h{many * cell - line}v{side}h-{many * cell - line}z")
            at += n
    return "".join(found)
