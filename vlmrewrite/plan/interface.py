"""What a pass is: a frozen dataclass that refuses or changes a plan."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar, Protocol, TypeVar, dataclass_transform, runtime_checkable

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from vlmrewrite.errors import explain
from vlmrewrite.plan.plan import Plan

T = TypeVar("T")


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, Field))
def frozen_pass(cls: type[T]) -> type[T]:
    """Turns a class into a pass: a frozen dataclass whose fields are checked strictly when it is made.

    The fields are the options, in Python and in a recipe; the class attribute `name` is the pass's key in a recipe:

        @frozen_pass
        class Stride:
            name: ClassVar[str] = "stride"
            keep: Budget
            at: Depth = 0

    Making an instance raises a `ValueError` with one line for each field that is wrong, such as
    `Stride.keep: expected an int >= 1 (tokens per image) or ..., got 0`.

    Raises:
        TypeError: the class has no `name` that is a string, or `name` is a field.
    """
    name = cls.__dict__.get("name")
    if not isinstance(name, str) or not name:
        raise TypeError(f"{cls.__name__}: expected a class attribute `name: ClassVar[str]`, got {name!r}")
    made: Any = dataclass(cls, frozen=True, config=ConfigDict(extra="forbid", strict=True))
    fields = [field.name for field in dataclasses.fields(made)]
    if "name" in fields:
        raise TypeError(f"{cls.__name__}: expected `name: ClassVar[str]`, got a field called 'name'")
    init = made.__init__

    @functools.wraps(init)
    def checked(self: T, *args: object, **kwargs: object) -> None:
        try:
            init(self, *args, **kwargs)
        except ValidationError as error:
            raise ValueError("\n".join(explain(error, cls.__name__, fields))) from None

    made.__init__ = checked
    return made  # type: ignore[no-any-return]


@runtime_checkable
class Pass(Protocol):
    """A technique: a frozen dataclass whose fields are its options (see :func:`frozen_pass`)."""

    name: ClassVar[str]

    def refuse(self, plan: Plan) -> str | None:
        """Why this pass cannot do its work on this plan, or None."""
        ...

    def change(self, plan: Plan) -> None:
        """Say to the plan what should happen."""
        ...
