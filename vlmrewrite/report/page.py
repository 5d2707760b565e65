"""Reports and programs as HTML: headings, a chart of each layer before and after, the vision tokens that were kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlmrewrite.markup import bars, folded, heading, html_of, items, listing, table
from vlmrewrite.report.report import Report
from vlmrewrite.report.summary import summary, verdict
from vlmrewrite.report.words import by_kernel, costs, graphs, kernels_folded, layer_rows
from vlmrewrite.rewrite import Program
from vlmrewrite.text import byte_size


@html_of.register
def report_html(report: Report) -> str:
    """A report."""
    parts = [heading(f"Recipe {report.recipe}, backend {report.backend}", 3), heading("Passes")]
    parts.append(_verdicts(report.passes))
    if report.layers:
        call = "" if report.call is None else f": {report.call['summary']}"
        parts += [heading(f"Last call with an image{call}"), items(costs(report)), _layers(report.layers)]
    if report.kept is not None:
        parts += [heading("Vision tokens that were kept"), report.kept.svg()]
    if report.plan:
        parts += [heading("Plan"), listing(report.plan)]
    if report.notes:
        parts += [heading("Notes"), items(report.notes)]
    told = graphs(report)
    if told:
        parts += [heading("Graphs"), items(told)]
    if report.kernels:
        rows = [(kernel, ", ".join(names), why) for (kernel, why), names in by_kernel(report).items()]
        title = kernels_folded(report).partition(" (")[0]
        parts.append(folded(title, table(["kernel", "nodes", "why"], rows)))
    return "".join(parts)


@html_of.register
def program_html(program: Program) -> str:
    """A program, captured or rewritten; its costs, if its call is known."""
    parts = [heading("Program", 3)]
    if program.outcomes and program.call is not None:
        found = summary(program)
        parts += [heading("Passes"), _verdicts(found["passes"]), heading("Layers"), _layers(found["layers"])]
        if found["notes"]:
            parts += [heading("Notes"), items(found["notes"])]
    return "".join([*parts, heading("Listing"), listing(str(program))])


def _verdicts(passes: Sequence[dict[str, Any]]) -> str:
    return table(["pass", "what became of it"], [(p["configuration"], verdict(p)) for p in passes])


def _layers(layers: Sequence[Mapping[str, Any]]) -> str:
    charts: list[tuple[str, str, Callable[[float], str]]] = [
        ("GFLOP of each layer", "flops", lambda n: f"{n / 1e9:.4g} GFLOP"),
        ("K/V bytes of each layer", "kv_bytes", byte_size),
    ]
    drawn = []
    for title, key, told in charts:
        before, after = [x[f"{key}_before"] for x in layers], [x[key] for x in layers]
        words = [f"{told(new)} of {told(old)}" for old, new in zip(before, after, strict=True)]
        drawn.append(f"<div>{bars(title, before, after, words)}</div>")
    headings, *rows = layer_rows(layers)
    return "".join([*drawn, table(headings, rows)])
