"""A report in words: what a terminal of 80 columns shows, and the pieces that its HTML has too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from vlmrewrite.report.summary import verdict
from vlmrewrite.text import WIDTH, byte_size, span, table, wrapped

if TYPE_CHECKING:
    from vlmrewrite.report.report import Report


def lines_of(report: Report, detailed: bool) -> list[str]:
    """The report; ``detailed``: with each choice of a kernel, and why it was made."""
    lines = [f"recipe {report.recipe}, backend {report.backend}"]
    for p in report.passes:
        line = f"  {p['configuration']}: {verdict(p)}"
        folded = [*wrapped(f"  {p['configuration']}:", "    "), *wrapped(f"    {verdict(p)}", "    ")]
        lines += [line] if len(line) <= WIDTH else folded
    if report.plan:
        lines += ["plan:", *(line for text in report.plan.splitlines() for line in wrapped(f"  {text}", " " * 8))]
    if report.layers:
        about = "" if report.call is None else f": {report.call['summary']}"
        lines += wrapped(f"costs of the last call with an image{about}", "  ")
        lines += [f"  {line}" for line in table(layer_rows(report.layers), WIDTH - 2, fold=1)]
        lines += [f"  {line}" for line in costs(report)]
    if report.kernels:
        lines += wrapped(kernels_folded(report), "  ")
    for (kernel, why), names in by_kernel(report).items() if detailed else ():
        lines += wrapped(f"  {kernel} for {', '.join(names)}: {why}", "    ")
    for line in [*graphs(report), *(f"note: {note}" for note in report.notes)]:
        lines += wrapped(line, "  ")
    return lines


def layer_rows(layers: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Headings, and a row for each run of layers that work on the same tokens at the same cost."""
    rows = [["layers", "run on", "tokens", "keys", "GFLOP", "of", "K/V", "of"]]
    keys = ("run_on", "mlp_on", "tokens", "keys", "flops", "flops_before", "kv_bytes", "kv_bytes_before")
    for (run, mlp, tokens, seen, *flops, kv, kv_before), group in groupby(layers, lambda x: [x[k] for k in keys]):
        counts = [str(tokens), str(seen), *(f"{n / 1e9:.4g}" for n in flops), byte_size(kv), byte_size(kv_before)]
        rows.append([span([x["layer"] for x in group]), run + f", MLP {mlp}" * (mlp != run), *counts])
    return rows


def costs(report: Report) -> list[str]:
    """Totals, and the peak memory if it is known."""
    before, after = report.totals["before"], report.totals["after"]
    flops = before["flops"] / max(1, after["flops"])
    kv = before["kv_bytes"] / max(1, after["kv_bytes"])
    told = [f"totals: FLOPs ÷ {flops:.2f}, K/V bytes ÷ {kv:.2f}"]
    if report.memory:
        most, least = report.memory["before"], report.memory["after"]
        told.append(f"peak memory: {byte_size(least)} of {byte_size(most)}, ÷ {most / max(1, least):.2f}")
    return told


def by_kernel(report: Report) -> dict[tuple[str, str], list[str]]:
    """For each kernel, and each reason to choose it, the operators and how many nodes there are of each."""
    out: dict[tuple[str, str], list[str]] = {}
    for name, made in report.kernels.items():
        for choice in made:
            out.setdefault((choice["kernel"], choice["why"]), []).append(f"{name} x{choice['nodes']}")
    return out


def kernels_folded(report: Report) -> str:
    """How many nodes each kernel got, in one line."""
    nodes: dict[str, int] = {}
    for choice in (choice for made in report.kernels.values() for choice in made):
        nodes[choice["kernel"]] = nodes.get(choice["kernel"], 0) + choice["nodes"]
    told = ", ".join(f"{kernel} for {n} nodes" for kernel, n in sorted(nodes.items()))
    return f"kernels: {told} (which and why: report.detail())"


def graphs(report: Report) -> list[str]:
    """How many graphs were captured, and what took how long."""
    told = []
    if report.graphs:
        copies = report.graphs.get("copied_layers", 0)
        alike = f", {copies} layers as copies of others that are like them" if copies else ""
        told.append(f"graphs captured: {report.graphs['captured']} of at most {report.graphs['limit']}{alike}")
    if report.seconds:
        told.append("seconds: " + ", ".join(f"{k} {v:.3f}" for k, v in report.seconds.items()))
    return told
