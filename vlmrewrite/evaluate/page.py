"""The page about an evaluation: one HTML file that needs nothing else, for light and dark screens."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from vlmrewrite.evaluate.plot import pareto
from vlmrewrite.evaluate.results import Evaluation, Row
from vlmrewrite.evaluate.sample import Sample
from vlmrewrite.markup import document, escape, table

_SHOWN = 12
"""Changed samples of a recipe that are shown."""

_SIDE = 240
"""Pixels of a picture's longer side."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1f7a5c; --bad: #b3402a; --soft: #8881; }
@media (prefers-color-scheme: dark) { :root { --good: #5cc7a0; --bad: #f08a72; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; } h3 { font-size: 1rem; }
svg.plot { width: 100%; max-width: 760px; font-size: 12px; } svg.plot text { fill: currentColor; }
.grid, .front, .bar, .lead { fill: none; stroke: currentColor; } .grid { opacity: .12; } .lead { opacity: .35; }
.front { stroke: var(--good); stroke-dasharray: 5 4; } .bar { opacity: .6; }
.best circle { fill: var(--good); } .other circle { fill: currentColor; opacity: .6; }
svg.plot text { paint-order: stroke; stroke: Canvas; stroke-width: 3px; }
.cards { display: flex; flex-wrap: wrap; gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; max-width: 34rem; }
.card p { margin: .15rem 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.pictures { display: flex; flex-wrap: wrap; gap: .5rem; } figure { margin: 0; max-width: 15rem; }
figcaption { font-size: .75rem; opacity: .8; } .card svg { display: block; width: 100%; min-width: 9rem; }
.better { color: var(--good); } .worse { color: var(--bad); }
"""


def page(done: Evaluation, samples: Sequence[Sample], batches: Sequence[dict[str, Any]]) -> str:
    """The HTML.

    Args:
        done: what was found.
        samples: all of the data.
        batches: with the pictures of what changed.
    """
    told = (
        f"{done.rows[0].n} samples, score: {done.about['metric']}. Intervals are 95 %; differences are paired with the"
        " unmodified model on the same samples. FLOPs and K/V are shares of its prefill's, speeds are multiples of its."
    )
    parts = [
        "<h1>Recipes beside the unmodified model</h1>",
        f"<p>{escape(told)}</p>",
        *(f"<p><b>Note:</b> {escape(note)}</p>" for note in done.notes),
        _table(done.cells()),
        *(f"<p>{escape(row.recipe)} does nothing: {escape(reason)}</p>" for row in done.rows for reason in row.refused),
        "<h2>Score against FLOPs</h2>",
        pareto(done.rows),
        "<p>The dashed line joins those that no other beats in both.</p>",
    ]
    if done.rows[0].kinds:
        parts += ["<h2>By kind</h2>", _table(_kinds(done.rows))]
    parts += ["<h2>What changed</h2>", *_gallery(done, samples, batches)]
    if done.failures:
        failed = [[str(failure[key]) for key in ("id", "recipe", "error")] for failure in done.failures]
        parts += ["<h2>Failed</h2>", _table([["sample", "recipe", "error"], *failed])]
    parts += ["<h2>Settings</h2>", table(["", ""], [[key, _plain(value)] for key, value in done.about.items()])]
    return document("vlmrewrite eval", f"<style>{STYLE}</style>{''.join(parts)}")


def _table(cells: Sequence[Sequence[str]]) -> str:
    return table(cells[0], cells[1:])


def _plain(value: Any) -> str:
    return "; ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _kinds(rows: Sequence[Row]) -> list[list[str]]:
    head = [["kind", "n", *(row.recipe for row in rows)]]
    for kind, first in rows[0].kinds.items():
        cells = [f"{100 * row.kinds[kind].accuracy:.1f}" for row in rows]
        moved = [f" ({100 * row.kinds[kind].difference:+.1f})" for row in rows]
        head.append([kind, str(first.n), cells[0], *(a + b for a, b in zip(cells[1:], moved[1:], strict=True))])
    return head


def _gallery(done: Evaluation, samples: Sequence[Sample], batches: Sequence[dict[str, Any]]) -> list[str]:
    """For each recipe the samples whose score changed, worse ones first."""
    known, base = {s.id: s for s in samples}, {}
    lines = {(line["recipe"], line["id"]): line for line in done.samples}
    pictures = {(p["recipe"], p["id"]): p["images"] for batch in batches for p in batch["pictures"]}
    left_out = {failure["id"] for failure in done.failures}
    base = {line["id"]: line for line in done.samples if line["recipe"] == done.rows[0].recipe}
    parts = []
    for row in done.rows[1:]:
        own = [lines[row.recipe, i] for name, i in pictures if name == row.recipe and i not in left_out]
        own.sort(key=lambda line: line["score"] - base[line["id"]]["score"])
        parts.append(f"<h3>{escape(row.recipe)}: {row.better} better, {row.worse} worse of {row.n}</h3>")
        cards = [_card(known[x["id"]], base[x["id"]], x, pictures[row.recipe, x["id"]]) for x in own[:_SHOWN]]
        parts.append(f'<div class="cards">{"".join(cards)}</div>' if cards else "<p>Nothing.</p>")
        if len(own) > _SHOWN:
            parts.append(f"<p>{len(own) - _SHOWN} more stand in samples.jsonl.</p>")
    return parts


def _card(sample: Sample, before: dict[str, Any], after: dict[str, Any], images: Sequence[dict[str, Any]]) -> str:
    change = "better" if after["score"] > before["score"] else "worse"
    lines = [("", f"{sample.id}{f' · {sample.kind}' if sample.kind else ''}"), ("", sample.question())]
    lines += [("reference: ", " / ".join(sample.answers))] * bool(sample.answers)
    lines += [("unmodified: ", f"{before['output']} ({before['score']:.2f})")]
    told = "".join(f"<p>{label}{escape(text)}</p>" for label, text in lines)
    now = f'<p class="{change}">with the recipe: {escape(after["output"])} ({after["score"]:.2f})</p>'
    drawn = "".join(
        f"<figure>{picture(one, kept, grid)}<figcaption>{escape(title)}: {kept.count('1')} of {len(kept)} tokens"
        f"{'' if grid['placed'] else ', in order, not where they lie'}</figcaption></figure>"
        for one, grid in _beside(sample.pictures(), images)
        for title, kept in grid["stages"].items()
    )
    return f'<div class="card">{told}{now}<div class="pictures">{drawn}</div></div>'


def _beside(pictures: Sequence[Any], grids: Sequence[dict[str, Any]]) -> list[tuple[Any, dict[str, Any]]]:
    """Grids of tokens with the picture that each lies on, None where there is not one grid for each picture."""
    if len(pictures) == len(grids):
        return list(zip(pictures, grids, strict=True))
    return [(None, grid) for grid in grids]


def picture(image: Any, kept: str, grid: dict[str, Any]) -> str:
    """An image with what is dropped of it covered, as SVG.

    Args:
        image: PIL; None, or where it is not known where tokens lie: cells alone.
        kept: ``1`` or ``0`` for each token, in row-major order.
        grid: its ``rows`` and ``columns``, and whether tokens are ``placed``.
    """
    wide, high = grid["columns"], grid["rows"]
    cells = [(i % wide, i // wide, mark) for i, mark in enumerate(kept)]
    gone, there = ("".join(f"M{x} {y}h1v1h-1z" for x, y, mark in cells if mark == which) for which in "01")
    if image is None or not grid["placed"]:
        drawn, ratio = f'<path d="{there}" fill="currentColor" opacity=".8"/>', high / wide
    else:
        drawn, ratio = (
            f'<image href="{_inline(image)}" width="{wide}" height="{high}" preserveAspectRatio="none"/>',
            image.height / image.width,
        )
    size = f'viewBox="0 0 {wide} {high}" style="aspect-ratio:{1 / ratio:.4f}" preserveAspectRatio="none"'
    cover = f'<path d="{gone}" fill="#777" fill-opacity=".82" shape-rendering="crispEdges"/>'
    return f'<svg {size} role="img">{drawn}{cover}</svg>'


def _inline(image: Any) -> str:
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((_SIDE, _SIDE))
    small.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
