"""Costs before and after as plain values: what a report, a listing for a terminal and JSON are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vlmrewrite.analysis import LayerCost
from vlmrewrite.plan import Outcome, Pass, Plan, TokenCounts
from vlmrewrite.rewrite import Program


def compared(
    program: Program,
    counts: TokenCounts,
    past: int,
    held: Sequence[int] = (),
    followed: Sequence[tuple[Plan, int]] = (),
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """What each layer works on and costs, and the totals, before and after.

    Args:
        program: the rewritten one.
        counts, past, held: as for :func:`vlmrewrite.analysis.costs`; ``held`` after only.
        followed: the plans that rows followed, and how many did, if they are not all the program's.
    """
    rows, plan = len(counts.text), program.plan
    plans = [p for p, _ in followed] or [plan]
    each = [replace(program, plan=p).costs(counts, past, held) for p in plans]
    after = [_together(found, [n for _, n in followed] or [rows], rows) for found in zip(*each, strict=True)]
    before = replace(program, plan=Plan(plan.depth)).costs(counts, past)
    layers = []
    for a, b in zip(after, before, strict=True):
        sets: dict[str, Any] = {"layer": a.index}
        for i, name in enumerate(("run_on", "attend_to", "mlp_on")):
            sets[name] = " / ".join(dict.fromkeys(p.render(p.layers[a.index].sets()[i]) for p in plans))
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


def _together(found: Sequence[LayerCost], share: Sequence[int], rows: int) -> LayerCost:
    """What a layer costs where so many of the rows follow each plan; the cache holds as much for each as for any."""
    flops = sum(c.flops * n // rows for c, n in zip(found, share, strict=True))
    run, keys, kv_bytes = (max(getattr(c, name) for c in found) for name in ("run", "keys", "kv_bytes"))
    return LayerCost(found[0].index, run, keys, flops, kv_bytes)


def dropping_nothing(plan: Plan, counts: TokenCounts) -> list[str]:
    """A line for each selection of a plan whose budget is all that there is to choose from, in every image."""
    found = []
    for one in plan.variants or (plan,):
        for s in one.selections():
            (kept, _), (left, _) = counts.per_image(s), counts.per_image(s.source)
            if kept == left and any(left):
                found.append(
                    f"{one.render(s)} drops nothing: at layer {s.at}, keep={s.keep} is all that is left of each image,"
                    f" at most {max(left)} tokens"
                )
    return list(dict.fromkeys(found))


_OTHERS = {
    "recurrent": "a token that they do not run on does not enter their state; FLOPs and bytes leave out recurrence and"
    " state",
    "indexed": "an index selects the keys that they attend to among those that they hold, each row's without padding",
}


def other_layers(plan: Plan) -> list[str]:
    """A line on the layers of each kind that mean something of their own."""
    layers = {kind: [i for i, other in sorted(plan.kinds.items()) if other == kind] for kind in _OTHERS}
    return [
        f"layers {', '.join(map(str, found))} are {kind}: {_OTHERS[kind]}" for kind, found in layers.items() if found
    ]


def saving_nothing(totals: dict[str, dict[str, float]], where: str, passes: Sequence[Pass] = ()) -> list[str]:
    """A line if there are as many FLOPs after as before, or more, and not all passes leave saving to the processor."""
    if passes and all(hasattr(p, "processor") for p in passes):
        return []
    return [f"this recipe saves no FLOPs on {where}"] * (totals["after"]["flops"] >= totals["before"]["flops"])


def by_processor(passes: Sequence[Pass]) -> list[str]:
    """A line on each pass that works by way of the processor, and so leaves the graph as it is."""
    return [
        f"{p!r} is the processor's part: costs, before and after, are those of the pictures that came, and what smaller"
        " ones save is not in them"
        for p in passes
        if hasattr(p, "processor")
    ]


def verdicts(outcomes: Sequence[Outcome], passes: Sequence[Pass] = ()) -> list[dict[str, Any]]:
    """What became of each pass: see :class:`vlmrewrite.plan.Outcome`; and whether the processor does what it is for."""
    outside = {repr(p) for p in passes if hasattr(p, "processor")}
    return [
        {
            "name": o.name,
            "configuration": o.configuration,
            "matched": o.reason is None,
            "changed": o.changed,
            "reason": o.reason,
            "by_processor": o.configuration in outside,
        }
        for o in outcomes
    ]


def verdict(told: dict[str, Any]) -> str:
    """One of :func:`verdicts` in words; ``matched`` is None before the first call with an image."""
    if told["matched"] is None:
        return "not tried yet"
    if not told["matched"]:
        return f"REFUSED: {told['reason']}"
    if told["by_processor"]:
        return "matched, BY THE PROCESSOR: the graph stays as it is"
    return "matched" if told["changed"] else "matched, CHANGES NOTHING"


def summary(program: Program, passes: Sequence[Pass] = ()) -> dict[str, Any]:
    """What each layer works on and costs, before and after, the totals, and what is to be noted; plain values.

    Of a dispatch, ``variants`` holds layers and totals of each of its plans, and those outside are the last one's, the
    most demanding; ``chooser`` says who chooses.

    Args:
        program: captured or rewritten.
        passes: what it was rewritten by.

    Raises:
        ValueError: the program's call is not known.
    """
    if program.call is None:
        raise ValueError("the program was captured from a call that is not known; expected one with a Call")
    plans = program.plan.variants or (program.plan,)
    found = [compared(replace(program, plan=plan), program.call.counts, program.call.past) for plan in plans]
    each = [{"layers": layers, "totals": totals} for layers, totals in found]
    notes = other_layers(program.plan) + dropping_nothing(program.plan, program.call.counts)
    notes += by_processor(passes)
    notes += saving_nothing(found[0][1], "this prompt", passes) if program.outcomes else []
    about = {"passes": verdicts(program.outcomes, passes), **each[-1], "seconds": program.seconds, "notes": notes}
    return about | ({"variants": each, "chooser": str(program.plan.chooser)} if program.plan.variants else {})
