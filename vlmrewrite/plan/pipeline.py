"""Passes, in order, on a plan."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlmrewrite.plan.interface import Pass
from vlmrewrite.plan.plan import Plan


@dataclass(frozen=True)
class Outcome:
    """What became of one pass: ``reason`` says why it was refused, or is None."""

    name: str
    configuration: str
    reason: str | None
    seconds: float = 0.0


def run_passes(plan: Plan, passes: Sequence[Pass], *, strict: bool = False) -> tuple[Plan, list[Outcome]]:
    """Let passes, in order, change a copy of a plan.

    Raises:
        ValueError: a pass is refused and ``strict`` is set, or a pass fails; notes name the pass.
        TypeError: something in ``passes`` is not a pass.
    """
    outcomes: list[Outcome] = []
    for p in passes:
        if not isinstance(p, Pass):
            raise TypeError(f"expected passes such as STS(keep=64), got {p!r}")
        begun = time.perf_counter()
        if plan.variants:
            plan, outcome = _run_on_variants(plan, p, strict)
            outcomes.append(outcome)
            continue
        plan = plan.copy()
        same = plan.said.count(p.name)
        plan.label = p.name if not same else f"{p.name}{same + 1}"
        plan.said.append(p.name)
        try:
            reason = p.refuse(plan)
            if reason is None:
                changed = plan.copy()
                p.change(changed)
                changed.check()
                plan = changed
        except Exception as e:
            e.add_note(f"in pass {p!r}, on the plan:\n{plan}")
            raise
        if reason is not None and strict:
            raise ValueError(f"{p!r} was refused: {reason}")
        outcomes.append(Outcome(p.name, repr(p), reason, time.perf_counter() - begun))
    return plan, outcomes


def _run_on_variants(plan: Plan, p: Pass, strict: bool) -> tuple[Plan, Outcome]:
    """Let a pass change each plan of a dispatch, or none if one refuses it."""
    said = [run_passes(v, [p], strict=strict) for v in plan.variants]
    plan = plan.copy()
    reasons = [f"variant {i}: {o.reason}" for i, (_, (o,)) in enumerate(said) if o.reason is not None]
    if reasons:
        return plan, replace(said[0][1][0], reason="; ".join(reasons))
    plan.variants = tuple(v for v, _ in said)
    for v in plan.variants:
        plan.blocks |= v.blocks
    return plan, said[0][1][0]
