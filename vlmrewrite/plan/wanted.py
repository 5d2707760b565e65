"""What is left of a plan to do where only the last prompt token is read behind the decoder."""

from __future__ import annotations

from collections.abc import Collection

from vlmrewrite.plan.call import Call
from vlmrewrite.plan.plan import Plan
from vlmrewrite.plan.tokens import All, Last


def for_last(plan: Plan, of_last: Collection[int]) -> Plan:
    """The plan without what no result depends on, where each row's last prompt token is all that is read.

    The last layer that makes keys, and those behind it, run on that token alone; their keys are as before. A branch
    that rejoins behind the decoder is left out. A plan that leaves all layers as they are stays so, unless some share
    keys: models of that kind do so themselves.

    Args:
        plan: not changed.
        of_last: the layers behind which nothing but the next layer reads another token.
    """
    if not plan.variants and all({*entry.sets()} == {All} and entry.owner is None for entry in plan.layers):
        return plan
    new = plan.copy()
    new.variants = tuple(for_last(variant, of_last) for variant in plan.variants)
    new.branches = [b for b in plan.branches if b.rejoin < plan.depth]
    events = [s.at for s in plan.selections()] + [e.at for e in plan.edits]
    events += [at for b in new.branches for at in (b.leave, b.rejoin)]
    first = max([plan.parts_at or 0, *events], default=0)
    for entry in reversed(new.layers[first:]):
        if entry.index not in of_last or entry.index in plan.kinds:
            break
        entry.run_set, entry.attend_set, entry.mlp_set = Last, entry.keys, None
        if entry.owner is None:
            break
    return new if new.selections() == plan.selections() else plan  # what was chosen is told


def ends_in_last_column(call: Call) -> bool:
    """Whether each row's last prompt token is in this call, in the last column."""
    there = call.last[:, 0] == call.length - 1
    return bool((there if call.ends is None else there & call.ends).all())
