"""The compact, layer-level listing of a program."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from vlmrewrite.plan import describe, events
from vlmrewrite.text import byte_size, span, table

if TYPE_CHECKING:
    from vlmrewrite.rewrite.program import Program


def listing(program: Program) -> str:
    """The compact, layer-level listing of a program: token sets, shapes, and costs if a call is known."""
    a, plan = program.anatomy, program.plan
    head = f"program: {len(a.layers)} decoder layers, hidden {a.hidden}, {str(a.dtype).removeprefix('torch.')}"
    if program.call is None:
        shapes = dict.fromkeys(
            f"attention: q {x.heads}x{x.head_size}, k, v {x.kv_heads}x{x.value_size}" for x in a.layers
        )
        return "\n".join([head, str(plan), *shapes])
    counts = program.call.counts
    per_layer = program.costs(counts, program.call.past)
    rows = [["layers", "run on", "attend to", "tokens", "keys", "q", "k, v", "GFLOP", "K/V"]]
    for (run, keys, flops, kv_bytes), group in groupby(
        per_layer, lambda c: (plan.layers[c.index].run_set, plan.layers[c.index].keys, c.flops, c.kv_bytes)
    ):
        cost, *more = group
        layer, layers = a.layers[cost.index], span([c.index for c in (cost, *more)])
        rows.append([layers, plan.render(run), plan.render(keys), str(cost.run), str(cost.keys),
                     f"{layer.heads}x{layer.head_size}", f"{layer.kv_heads}x{layer.value_size}", f"{flops / 1e9:.4g}",
                     byte_size(kv_bytes)])  # fmt: skip
    flops, kv_bytes = sum(c.flops for c in per_layer), sum(c.kv_bytes for c in per_layer)
    total = f"total: {flops / 1e9:.4g} GFLOP, K/V {byte_size(kv_bytes)}"
    return "\n".join([f"{head}; {describe(counts)}", *events(plan), *table(rows), total])
