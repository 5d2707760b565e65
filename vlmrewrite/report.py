"""Reports: what was matched and refused, and what each layer costs before and after."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from vlmrewrite.anatomy import Layer
from vlmrewrite.census import Census
from vlmrewrite.plan import Plan
from vlmrewrite.program import LayerCost, Program, costs

if TYPE_CHECKING:
    from vlmrewrite.session import Session
    from vlmrewrite.traced import Traced


def listing(program: Program) -> str:
    """The compact, layer-level listing of a program: token sets, shapes, and costs if a call is known."""
    a = program.anatomy
    head = f"program: {len(a.layers)} decoder layers, hidden {a.hidden}, {str(a.dtype).removeprefix('torch.')}"
    if program.call is None:
        return f"{head}\n{program.plan}\n" + "\n".join(_shape(layer) for layer in _distinct(a.layers))
    census = program.call.census
    lines = [f"{head}; {_describe(census)}"]
    plan = str(program.plan).splitlines()
    lines += [line for line in plan if not line.startswith("layer")]
    per_layer = costs(program, census, program.call.past)
    rows = [["layers", "run on", "attend to", "tokens", "keys", "q", "k, v", "GFLOP", "K/V"]]
    for layers, cost in _grouped(program, per_layer):
        entry, layer = program.plan.layers[layers[0]], a.layers[layers[0]]
        rows.append([_span(layers), program.plan.render(entry.run_set), program.plan.render(entry.keys), str(cost.run),
                     str(cost.keys), f"{layer.heads}x{layer.head_size}", f"{layer.kv_heads}x{layer.value_size}",
                     f"{cost.flops / 1e9:.4g}", _bytes(cost.kv_bytes)])  # fmt: skip
    lines += _table(rows)
    lines.append(
        f"total: {sum(c.flops for c in per_layer) / 1e9:.4g} GFLOP, K/V {_bytes(sum(c.kv_bytes for c in per_layer))}"
    )
    return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """What a recipe did to a model. ``str`` for a terminal, ``to_dict`` for JSON, HTML in a notebook.

    Costs are those of the last call with an image: matmul FLOPs of the decoder layers' prefill and bytes of K/V added
    to the cache, all rows together. Before the first such call they are missing.
    """

    recipe: str
    backend: str
    plan: str | None
    passes: tuple[dict[str, Any], ...]
    layers: tuple[dict[str, Any], ...] = ()
    totals: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] | None = None
    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    graphs: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings."""
        return {
            "recipe": self.recipe,
            "backend": self.backend,
            "plan": self.plan,
            "passes": list(self.passes),
            "layers": list(self.layers),
            "totals": self.totals,
            "call": self.call,
            "kernels": self.kernels,
            "graphs": self.graphs,
            "seconds": self.seconds,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        lines = [f"recipe {self.recipe}, backend {self.backend}"]
        for p in self.passes:
            state = (
                "not tried yet" if p["matched"] is None else "matched" if p["matched"] else f"REFUSED: {p['reason']}"
            )
            lines.append(f"  {p['configuration']}: {state}")
        if self.plan:
            lines += ["plan:", *(f"  {line}" for line in self.plan.splitlines())]
        if self.layers:
            lines += [
                "costs of the last call with an image" + (f" ({self.call['summary']})" if self.call else "") + ":"
            ]
            lines += [f"  {line}" for line in self._layer_table()]
            lines.append(f"  totals: {self._totals()}")
        if self.kernels:
            for (kernel, why), names in self._by_kernel().items():
                lines.append(f"kernels: {kernel} for {', '.join(names)} ({why})")
        if self.graphs:
            lines.append(f"graphs captured: {self.graphs['captured']} of at most {self.graphs['limit']}")
        if self.seconds:
            lines.append("seconds: " + ", ".join(f"{k} {v:.3f}" for k, v in self.seconds.items()))
        return "\n".join([*lines, *(f"note: {n}" for n in self.notes)])

    def _layer_table(self) -> list[str]:
        rows = [["layers", "run on", "tokens", "keys", "GFLOP", "of", "K/V", "of"]]
        keys = ("run_on", "tokens", "keys", "flops", "flops_before", "kv_bytes", "kv_bytes_before")
        for _, group in groupby(self.layers, key=lambda x: tuple(x[k] for k in keys)):
            same = list(group)
            x = same[0]
            rows.append([_span([s["layer"] for s in same]), x["run_on"], str(x["tokens"]), str(x["keys"]),
                         f"{x['flops'] / 1e9:.4g}", f"{x['flops_before'] / 1e9:.4g}", _bytes(x["kv_bytes"]),
                         _bytes(x["kv_bytes_before"])])  # fmt: skip
        return _table(rows)

    def _by_kernel(self) -> dict[tuple[str, str], list[str]]:
        out: dict[tuple[str, str], list[str]] = {}
        for name, choice in self.kernels.items():
            out.setdefault((choice["kernel"], choice["why"]), []).append(f"{name} x{choice['nodes']}")
        return out

    def _totals(self) -> str:
        before, after = self.totals["before"], self.totals["after"]
        flops = before["flops"] / max(1, after["flops"])
        kv = before["kv_bytes"] / max(1, after["kv_bytes"])
        return f"FLOPs ÷ {flops:.2f}, K/V bytes ÷ {kv:.2f}"

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>"
            + "".join(f"<td>{html.escape(str(x[k]))}</td>" for k in ("layer", "run_on", "tokens", "keys"))
            + "</tr>"
            for x in self.layers
        )
        head = "<tr><th>layer</th><th>run on</th><th>tokens</th><th>keys</th></tr>"
        table = f"<table>{head}{rows}</table>" if rows else ""
        return f"<pre>{html.escape(str(self))}</pre>{table}"


def make_report(session: Session, traced: Traced | None) -> Report:
    """The report of a session; see :func:`vlmrewrite.report`."""
    notes = []
    if session.plain_calls:
        notes.append(
            f"{session.plain_calls} calls without an image (text-only prompts and decode steps) ran unrewritten"
        )
    limit = {"captured": traced.call.graphs, "limit": traced.call.limit} if traced is not None else {}
    if session.latest is None:
        passes: tuple[dict[str, Any], ...] = tuple(
            {"name": p.name, "configuration": repr(p), "matched": None, "reason": None} for p in session.passes
        )
        return Report(session.recipe.name, session.backend, None, passes, graphs=limit, notes=tuple(notes))
    installed, call = session.latest
    program = installed.program
    after = costs(program, call.census, call.past)
    before = costs(_unplanned(program), call.census, call.past)
    passes = tuple(
        {"name": o.name, "configuration": o.configuration, "matched": o.reason is None, "reason": o.reason}
        for o in program.outcomes
    )
    layers = tuple(
        {
            "layer": a.index,
            "run_on": program.plan.render(program.plan.layers[a.index].run_set),
            "attend_to": program.plan.render(program.plan.layers[a.index].keys),
            "tokens": a.run,
            "keys": a.keys,
            "tokens_before": b.run,
            "keys_before": b.keys,
            "flops": a.flops,
            "flops_before": b.flops,
            "kv_bytes": a.kv_bytes,
            "kv_bytes_before": b.kv_bytes,
        }
        for a, b in zip(after, before, strict=True)
    )
    totals = {name: _sum(rows) for name, rows in (("before", before), ("after", after))}
    if totals["after"]["flops"] >= totals["before"]["flops"]:
        notes.append("this recipe saves no FLOPs on the last call")
    seconds = {**program.seconds}
    if traced is not None:
        seconds = {"capture": traced.call.seconds, **seconds}
    return Report(
        session.recipe.name,
        session.backend,
        str(program.plan),
        passes,
        layers,
        totals,
        {"summary": _describe(call.census), "rows": len(call.census.text), "length": call.length,
         "images": list(call.census.images), "past": call.past},
        installed.lowered.choices,
        limit,
        seconds,
        tuple(notes),
    )  # fmt: skip


def _unplanned(program: Program) -> Program:
    from dataclasses import replace

    return replace(program, plan=Plan(program.plan.depth))


def _sum(rows: list[LayerCost]) -> dict[str, int]:
    return {"flops": sum(r.flops for r in rows), "kv_bytes": sum(r.kv_bytes for r in rows)}


def _describe(census: Census) -> str:
    rows, images = len(census.text), len(census.images)
    return (
        f"{rows} row{'s' * (rows != 1)} of {census.length} tokens, {images} image{'s' * (images != 1)},"
        f" {sum(census.images)} vision tokens" + (", padded" if census.padded else "")
    )


def _grouped(program: Program, per_layer: list[LayerCost]) -> list[tuple[list[int], LayerCost]]:
    def key(c: LayerCost) -> tuple[object, ...]:
        entry = program.plan.layers[c.index]
        return entry.run_set, entry.keys, c.flops, c.kv_bytes

    out = []
    for _, group in groupby(per_layer, key=key):
        found = list(group)
        out.append(([c.index for c in found], found[0]))
    return out


def _distinct(layers: tuple[Layer, ...]) -> list[Layer]:
    return list({(x.heads, x.kv_heads, x.head_size, x.value_size): x for x in layers}.values())


def _shape(layer: Layer) -> str:
    return f"attention: q {layer.heads}x{layer.head_size}, k, v {layer.kv_heads}x{layer.value_size}"


def _span(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def _bytes(n: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024  # type: ignore[assignment]
    return f"{n:.4g} GiB"


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
