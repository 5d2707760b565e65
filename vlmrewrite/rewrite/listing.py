"""The compact, layer-level listing of a program."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from vlmrewrite.analysis import Layer, LayerCost
from vlmrewrite.plan import describe, events
from vlmrewrite.text import byte_size, span, table

if TYPE_CHECKING:
    from vlmrewrite.rewrite.program import Program


def listing(program: Program) -> str:
    """The compact, layer-level listing of a program: token sets, shapes, and costs if a call is known."""
    a = program.anatomy
    head = f"program: {len(a.layers)} decoder layers, hidden {a.hidden}, {str(a.dtype).removeprefix('torch.')}"
    if program.call is None:
        return f"{head}\n{program.plan}\n" + "\n".join(_shape(layer) for layer in _distinct(a.layers))
    counts = program.call.counts
    lines = [f"{head}; {describe(counts)}"]
    lines += events(program.plan)
    per_layer = program.costs(counts, program.call.past)
    rows = [["layers", "run on", "attend to", "tokens", "keys", "q", "k, v", "GFLOP", "K/V"]]
    for layers, cost in _grouped(program, per_layer):
        entry, layer = program.plan.layers[layers[0]], a.layers[layers[0]]
        rows.append([span(layers), program.plan.render(entry.run_set), program.plan.render(entry.keys), str(cost.run),
                     str(cost.keys), f"{layer.heads}x{layer.head_size}", f"{layer.kv_heads}x{layer.value_size}",
                     f"{cost.flops / 1e9:.4g}", byte_size(cost.kv_bytes)])  # fmt: skip
    lines += table(rows)
    lines.append(
        f"total: {sum(c.flops for c in per_layer) / 1e9:.4g} GFLOP, K/V {byte_size(sum(c.kv_bytes for c in per_layer))}"
    )
    return "\n".join(lines)


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
