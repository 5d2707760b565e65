"""Recipes and passes as plain data: what there is, for lists and JSON."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from typing import Any

from vlmrewrite.plan import Budget, Depth
from vlmrewrite.recipe import Recipe, shipped_recipes
from vlmrewrite.registry import usable_passes


def recipes() -> list[dict[str, Any]]:
    """The shipped recipes, by name."""
    return [recipe_data(recipe) for recipe in shipped_recipes().values()]


def recipe_data(recipe: Recipe) -> dict[str, Any]:
    """A recipe: its fields, and name and options of each pass."""
    items = [{"name": p.name, "options": dataclasses.asdict(p)} for p in recipe.passes]
    return recipe.model_dump(exclude={"passes"}) | {"passes": items}


def passes() -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every pass that a recipe can hold, and for those that other packages register in vain what is wrong with them.

    Of each: name, description, package and options.
    """
    usable, wrong = usable_passes()
    found = [
        {
            "name": name,
            "description": (inspect.getdoc(kind) or "").partition("\n")[0].replace("``", ""),
            "package": kind.__module__.partition(".")[0],
            "options": _options(kind),
        }
        for name, kind in usable.items()
    ]
    return found, wrong


def _options(kind: type[Any]) -> list[dict[str, Any]]:
    hints = typing.get_type_hints(kind, include_extras=True)
    out = []
    for f in dataclasses.fields(kind):
        made = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        option = {"name": f.name, "type": _type_name(hints[f.name]), "required": made is dataclasses.MISSING}
        out.append(option | ({} if option["required"] else {"default": made}))
    return out


def _type_name(hint: Any) -> str:
    """The type as it is written: Budget and Depth by their names, other annotations left out."""
    if hint in (Budget, Depth):
        return "Budget" if hint == Budget else "Depth"
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not arguments else str(hint)
