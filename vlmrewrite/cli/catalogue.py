"""Recipes and passes as plain data: what there is, for lists and JSON."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Mapping
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from vlmrewrite.cli.sources import Option, shipped_passes, shipped_recipes, source

if TYPE_CHECKING:
    from vlmrewrite.recipe import Recipe

_GROUP = "vlmrewrite.passes"
"""That of :mod:`vlmrewrite.registry`, which is not imported here if nobody registers anything."""

Kinds = Mapping[str, Any]
"""The types of options that have names of their own."""


def recipes() -> list[dict[str, Any]]:
    """The shipped recipes, by name."""
    return shipped_recipes()


def recipe_data(recipe: Recipe) -> dict[str, Any]:
    """A recipe: its fields, and name and options of each pass."""
    items = [{"name": p.name, "options": dataclasses.asdict(p)} for p in recipe.passes]
    return recipe.model_dump(exclude={"passes"}) | {"passes": items}


def passes() -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Every pass that a recipe can hold, and for those that other packages register in vain what is wrong with them.

    Of each: name, description, package and options. Other packages' passes are imported, and torch with them.
    """
    if entry_points(group=_GROUP):
        return passes_by_class()
    kinds = source("plan", "budget")
    return [_data(name, one.doc, "vlmrewrite", one.options, kinds) for name, one in shipped_passes().items()], {}


def passes_by_class() -> tuple[list[dict[str, Any]], dict[str, str]]:
    """:func:`passes`, as the classes themselves tell."""
    from vlmrewrite import plan
    from vlmrewrite.registry import usable_passes

    usable, wrong = usable_passes()
    found = []
    for name, kind in usable.items():
        hints = typing.get_type_hints(kind, include_extras=True)
        options = {f.name: Option(hints[f.name], _default(f)) for f in dataclasses.fields(kind)}
        package = kind.__module__.partition(".")[0]
        found.append(_data(name, inspect.getdoc(kind) or "", package, options, vars(plan)))
    return found, wrong


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _data(name: str, doc: str, package: str, options: Mapping[str, Option], kinds: Kinds) -> dict[str, Any]:
    told = {"name": name, "description": doc.partition("\n")[0].replace("``", "`"), "package": package}
    out = []
    for key, (hint, default) in options.items():
        option = {"name": key, "type": type_name(hint, kinds), "required": default is dataclasses.MISSING}
        out.append(option | ({} if option["required"] else {"default": default}))
    return told | {"options": out}


_WORDS = {type(None): "None", Any: "anything", collections.abc.Callable: "function", collections.abc.Sequence: "list"}
_WORDS |= {tuple: "list", dict: "mapping"}
"""What is not written as Python names it."""


def type_name(hint: Any, kinds: Kinds) -> str:
    """The type as one would say it: Budget, Depth and Layers by their names, numbers with their bounds."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    for name in ("Budget", "Depth", "Layers"):
        if typing.get_args(kinds[name])[1] in arguments:  # what checks it; there may be more annotations
            return name
    if origin is typing.Annotated:
        told = [x for one in arguments[1:] for x in getattr(one, "metadata", [one])]
        return type_name(arguments[0], kinds) + _bounds({key: value for x in told for key, value in _bound(x)})
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(type_name(x, kinds) for x in arguments))
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    word = _WORDS.get(origin or hint) or (origin or hint).__name__
    items = [type_name(x, kinds) for x in arguments[:1]] if word == "list" else []
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
