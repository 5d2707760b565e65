"""Recipes and passes as plain data: what there is, for lists and JSON."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from typing import Any

from vlmrewrite.plan import Budget, Depth, Layers
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
            "description": (inspect.getdoc(kind) or "").partition("\n")[0].replace("``", "`"),
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


_NAMED = (("Budget", Budget), ("Depth", Depth), ("Layers", Layers))

_WORDS = {type(None): "None", Any: "anything", collections.abc.Callable: "function", collections.abc.Sequence: "list"}
_WORDS |= {tuple: "list", dict: "mapping"}
"""What is not written as Python names it."""


def _type_name(hint: Any) -> str:
    """The type as one would say it: Budget, Depth and Layers by their names, numbers with their bounds."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    for name, kind in _NAMED:
        if typing.get_args(kind)[1] in arguments:  # what checks it; there may be more annotations
            return name
    if origin is typing.Annotated:
        told = [x for one in arguments[1:] for x in getattr(one, "metadata", [one])]
        return _type_name(arguments[0]) + _bounds({key: value for x in told for key, value in _bound(x)})
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(_type_name, arguments)))
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    word = _WORDS.get(origin or hint) or (origin or hint).__name__
    items = [_type_name(x) for x in arguments[:1]] if word == "list" else []
    return f"{word} of {items[0]}" if items else word


def _bound(told: Any) -> list[tuple[str, Any]]:
    """What an annotation says of the least and the greatest value."""
    return [(key, getattr(told, key)) for key in ("gt", "ge", "lt", "le") if getattr(told, key, None) is not None]


def _bounds(told: dict[str, Any]) -> str:
    """Bounds as one writes them: an interval, or one comparison."""
    low, high = told.get("gt", told.get("ge")), told.get("lt", told.get("le"))
    if low is not None and high is not None:
        return f" in {'(' if 'gt' in told else '['}{low}, {high}{')' if 'lt' in told else ']'}"
    words = {"gt": "above", "ge": "of at least", "lt": "below", "le": "of at most"}
    return "".join(f" {words[key]} {value}" for key, value in told.items())
