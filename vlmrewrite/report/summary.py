"""Costs before and after as plain values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vlmrewrite.plan import Plan
from vlmrewrite.rewrite import Program


def summary(program: Program) -> dict[str, Any]:
    """What each layer works on and costs, before and after, and the totals; plain values.

    Raises:
        ValueError: the program's call is not known.
    """
    if program.call is None:
        raise ValueError("the program was captured from a call that is not known; expected one with a Call")
    counts, past = program.call.counts, program.call.past
    after = program.costs(counts, past)
    before = replace(program, plan=Plan(program.plan.depth)).costs(counts, past)
    layers = []
    for a, b in zip(after, before, strict=True):
        entry = program.plan.layers[a.index]
        where = {"layer": a.index, "run_on": program.plan.render(entry.run_set)}
        where["attend_to"] = program.plan.render(entry.keys)
        now = {"tokens": a.run, "keys": a.keys, "flops": a.flops, "kv_bytes": a.kv_bytes}
        then = {"tokens": b.run, "keys": b.keys, "flops": b.flops, "kv_bytes": b.kv_bytes}
        layers.append(where | now | {f"{k}_before": v for k, v in then.items()})
    return {
        "passes": [
            {"name": o.name, "configuration": o.configuration, "matched": o.reason is None, "reason": o.reason}
            for o in program.outcomes
        ],
        "layers": layers,
        "totals": {
            name: {
                "flops": sum(c.flops for c in found),
                "kv_bytes": sum(c.kv_bytes for c in found),
                "tokens": sum(c.run for c in found) / len(found),
            }
            for name, found in (("before", before), ("after", after))
        },
        "seconds": program.seconds,
    }
