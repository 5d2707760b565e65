"""Costs before and after as plain values: what a report, a listing for a terminal and JSON are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vlmrewrite.plan import Outcome, Plan, TokenCounts
from vlmrewrite.rewrite import Program


def compared(
    program: Program, counts: TokenCounts, past: int, held: Sequence[int] = ()
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """What each layer works on and costs, and the totals, before and after.

    Args:
        program: the rewritten one.
        counts, past, held: as for :func:`vlmrewrite.analysis.costs`; ``held`` after only.
    """
    after, plan = program.costs(counts, past, held), program.plan
    before = replace(program, plan=Plan(plan.depth)).costs(counts, past)
    layers = []
    for a, b in zip(after, before, strict=True):
        entry = plan.layers[a.index]
        sets = {"layer": a.index, "run_on": plan.render(entry.run_set), "attend_to": plan.render(entry.keys)}
        sets["mlp_on"] = plan.render(entry.sets()[2])
        now = {"tokens": a.run, "keys": a.keys, "flops": a.flops, "kv_bytes": a.kv_bytes}
        then = {"tokens": b.run, "keys": b.keys, "flops": b.flops, "kv_bytes": b.kv_bytes}
        layers.append(sets | now | {f"{k}_before": v for k, v in then.items()})
    totals: dict[str, dict[str, float]] = {
        name: {
            "flops": sum(c.flops for c in found),
            "kv_bytes": sum(c.kv_bytes for c in found),
            "tokens": sum(c.run for c in found) / len(found),
        }
        for name, found in (("before", before), ("after", after))
    }
    return layers, totals


def verdicts(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """What became of each pass."""
    return [
        {"name": o.name, "configuration": o.configuration, "matched": o.reason is None, "reason": o.reason}
        for o in outcomes
    ]


def summary(program: Program) -> dict[str, Any]:
    """What each layer works on and costs, before and after, and the totals; plain values.

    Of a dispatch, ``variants`` holds layers and totals of each of its plans, and those outside are the last one's, the
    most demanding; ``chooser`` says who chooses.

    Raises:
        ValueError: the program's call is not known.
    """
    if program.call is None:
        raise ValueError("the program was captured from a call that is not known; expected one with a Call")
    plans = program.plan.variants or (program.plan,)
    found = [compared(replace(program, plan=plan), program.call.counts, program.call.past) for plan in plans]
    each = [{"layers": layers, "totals": totals} for layers, totals in found]
    about = {"passes": verdicts(program.outcomes), **each[-1], "seconds": program.seconds}
    return about | ({"variants": each, "chooser": str(program.plan.chooser)} if program.plan.variants else {})
