"""What a pass is, a frozen dataclass that refuses or changes a plan; and passes, in order, on a plan."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, TypeVar, dataclass_transform, runtime_checkable

import pydantic

from vlmrewrite.errors import explain, noted
from vlmrewrite.plan.plan import Plan
from vlmrewrite.plan.tokens import contains

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, pydantic.Field))
def frozen_pass(cls: type[T]) -> type[T]:
    """Turns a class into a pass: a frozen dataclass whose fields are checked strictly when it is made.

    The fields are the options, in Python and in a recipe; the class attribute `name` is the pass's key in a recipe:

        @frozen_pass
        class Stride:
            name: ClassVar[str] = "stride"
            keep: Budget
            at: Depth = 0

    An option of type `float` turns an int into a float. Where 1 and 1.0 mean different things, as in a budget (one
    token, all tokens), give it the type :data:`vlmrewrite.Budget` or `int | float`: in Python and in recipe files it
    then stays what was written.

    Making an instance raises a `ValueError` with one line for each field that is wrong, such as
    `Stride.keep: expected an int >= 1 (tokens per image) or ..., got 0`.

    Raises:
        TypeError: the class has no `name` that is a string, or `name` is a field.
    """
    name = cls.__dict__.get("name")
    if not isinstance(name, str) or not name:
        raise TypeError(f"{cls.__name__}: expected a class attribute `name: ClassVar[str]`, got {name!r}")
    made: Any = pydantic.dataclasses.dataclass(cls, frozen=True, config={"extra": "forbid", "strict": True})
    fields = [field.name for field in dataclasses.fields(made)]
    if "name" in fields:
        raise TypeError(f"{cls.__name__}: expected `name: ClassVar[str]`, got a field called 'name'")
    init = made.__init__

    @functools.wraps(init)
    def checked(self: T, *args: object, **kwargs: object) -> None:
        try:
            init(self, *args, **kwargs)
        except pydantic.ValidationError as error:
            raise ValueError("\n".join(explain(error, cls.__name__, fields))) from None

    made.__init__ = checked
    return made  # type: ignore[no-any-return]


@runtime_checkable
class Pass(Protocol):
    """A technique: a frozen dataclass whose fields are its options (see :func:`frozen_pass`).

    One whose blocks are not trained by the model's own loss alone has an attribute or property ``trained_by``: words of
    :data:`vlmrewrite.training.TRAINED_BY`.
    """

    name: ClassVar[str]

    def refuse(self, plan: Plan) -> str | None:
        """Why this pass cannot do its work on this plan, or None."""

    def change(self, plan: Plan) -> None:
        """Say to the plan what should happen."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one pass.

    Attributes:
        reason: why it was refused: what it said itself, or that something it asks for is not there, or that its
            ``change`` says nothing; or None.
        changed: whether the plan is another one behind it. One that keeps everything, by ``keep=1.0`` say, is the same.
    """

    name: str
    configuration: str
    reason: str | None
    seconds: float = 0.0
    changed: bool = True


def run_passes(plan: Plan, passes: Sequence[Pass], *, strict: bool = False) -> tuple[Plan, list[Outcome]]:
    """Let passes, in order, change a copy of a plan.

    A pass is also refused if a policy or an edit of it asks for what is not in the plan's ``features``, or if its
    ``change`` says nothing at all.

    Raises:
        ValueError: a pass is refused and ``strict`` is set, or a pass fails; notes name the pass.
        TypeError: something in ``passes`` is not a pass.
    """
    outcomes: list[Outcome] = []
    for p in passes:
        if not isinstance(p, Pass):
            raise TypeError(f"expected passes such as STS(keep=64), got {p!r}")
        plan, outcome = (_run_on_variants if plan.variants else _run)(plan, p, strict)
        outcomes.append(outcome)
    return plan, outcomes


def _run(plan: Plan, p: Pass, strict: bool) -> tuple[Plan, Outcome]:
    """Let a pass change a copy of a plan that does not dispatch."""
    begun, plan = time.perf_counter(), plan.copy()
    same = plan.said.count(p.name)
    plan.label = p.name if not same else f"{p.name}{same + 1}"
    plan.said.append(p.name)
    with noted(lambda _: [f"in pass {p!r}, on the plan:\n{plan}"]):
        new, reason = plan.copy(), p.refuse(plan)
        if reason is None:
            p.change(new)
            spoke = new != plan or any(entry.told for entry in new.layers)
            reason = new.unmet() or _beyond_layers(new) if spoke else "its `change` says nothing to the plan"
        if reason is None:
            new.check()
    if reason is not None and strict:
        raise ValueError(f"{p!r} was refused: {reason} (strict=False passes it over)")
    outcome = Outcome(p.name, repr(p), reason, time.perf_counter() - begun, reason is None and new != plan)
    return new if reason is None else plan, outcome


def _run_on_variants(plan: Plan, p: Pass, strict: bool) -> tuple[Plan, Outcome]:
    """Let a pass change each plan of a dispatch, or none if one refuses it."""
    plan, said = plan.copy(), [_run(v, p, strict) for v in plan.variants]
    outcome = max((o for _, o in said), key=lambda o: o.changed)
    reasons = [f"variant {i}: {o.reason}" for i, (_, o) in enumerate(said) if o.reason is not None]
    if reasons:
        return plan, dataclasses.replace(outcome, reason="; ".join(reasons), changed=False)
    plan.variants = tuple(v for v, _ in said)
    for v in plan.variants:
        plan.blocks |= v.blocks
    return plan, outcome


def _beyond_layers(plan: Plan) -> str | None:
    """Why a layer of another kind, or with another one's keys, cannot do what a plan or a variant says; or None."""
    for entry, scored in ((x, p.scored(x.index)) for p in plan.variants or (plan,) for x in p.layers):
        kind, keys = plan.kinds.get(entry.index), plan.render(entry.keys)
        if kind == "recurrent" and entry.keys != entry.run_set:
            found = f"cannot attend to {keys} and run on {plan.render(entry.run_set)}"
        elif kind and scored:
            found = f"pays no attention {'that is known' if kind == 'indexed' else 'to choose by'}"
        elif entry.owner and (lacking := [s for s in scored if not contains(entry.keys, s)]):
            found = f"attends to layer {entry.owner.index}'s keys of {keys}, not of {plan.render(lacking[0])}"
        else:
            continue
        others = [i for i, x in enumerate(plan.layers) if i not in plan.kinds and (kind or x.owner is None)]
        which = (
            f"{'attention' if kind else 'keys of its own'}, {', '.join(map(str, others)) or 'of which there is none'}"
        )
        return f"layer {entry.index} {f'is {kind} and ' * bool(kind)}{found}; expected one of the layers with {which}"
    return None
