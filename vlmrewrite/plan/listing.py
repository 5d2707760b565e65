"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from vlmrewrite.plan.tokens import Pair, Selection
from vlmrewrite.plan.vocabulary import LayerPlan
from vlmrewrite.text import span

if TYPE_CHECKING:
    from vlmrewrite.plan.plan import Plan


def labels(plan: Plan) -> dict[Selection, str]:
    """A short name for each selection: its policy's name, numbered if needed."""
    out: dict[Selection, str] = {}
    for s in plan.selections():
        before = sum(other.policy.name == s.policy.name for other in out)
        out[s] = f"{s.policy.name}{before + 1}" if before else s.policy.name
    return out


def events(plan: Plan) -> list[str]:
    """A line for each selection, edit and branch."""
    lines = []
    for s, label in labels(plan).items():
        source = plan.render(s.source)
        source = f"({source})" if isinstance(s.source, Pair) else source
        lines.append(f"{label} = {source}.select({s.policy.name}, keep={s.keep}) at layer {s.at}")
    lines += [f"{e.name} edits {plan.render(e.tokens)} at layer {e.at}" for e in plan.edits]
    for b in plan.branches:
        block = "nothing" if b.block is None else f"{b.block}, {plan.blocks[b.block]}"
        lines.append(f"branch {plan.render(b.tokens)} from layer {b.leave} to {b.rejoin} through {block}")
    return lines


def dispatched(plan: Plan, variants: Iterable[object]) -> list[str]:
    """Who chooses among the plans of a dispatch, and what is said of each."""
    head = f"dispatch by {plan.chooser} at layer {plan.parts_at} among"
    return [head, *(f"variant {i}:\n{v}" for i, v in enumerate(variants))]


def listing(plan: Plan) -> str:
    """What happens, and what each run of layers does."""
    if plan.variants:
        return "\n".join(dispatched(plan, plan.variants))
    lines = events(plan)
    for (run, keys, mlp), group in groupby(plan.layers, key=LayerPlan.sets):
        found = [e.index for e in group]
        where = f"layer{'s' * (len(found) > 1)} {span(found)}"
        line = f"{where:<14} run_on {plan.render(run)}"
        line += "" if run == keys else f", attend_to {plan.render(keys)}"
        lines.append(line + ("" if run == mlp else f", mlp_on {plan.render(mlp)}"))
    return "\n".join(lines)
