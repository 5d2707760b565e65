"""Where passes are found: those that come with vlmrewrite, and those that other packages register."""

from __future__ import annotations

import dataclasses
import importlib
import typing
from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from pydantic.dataclasses import is_pydantic_dataclass

from vlmrewrite.errors import one_of, shown
from vlmrewrite.plan import Depth, Layers

GROUP = "vlmrewrite.passes"
"""The entry-point group under which other packages register their passes: `name = "module:Class"`."""


def known_passes() -> dict[str, type[Any]]:
    """Every pass by its recipe key: those of `vlmrewrite.passes`, then those of other packages, sorted by name.

    Raises:
        ImportError: a registered pass cannot be loaded.
        TypeError: what is registered is not a class made with `frozen_pass`.
        ValueError: a name is registered twice, or differs from the `name` of its class.
    """
    return {name: find_pass(name) for name in _names()}


def usable_passes() -> tuple[dict[str, type[Any]], dict[str, str]]:
    """The passes that can be used, by their recipe keys, and for the others what is wrong with them."""
    found, wrong = {}, {}
    for name in _names():
        try:
            found[name] = find_pass(name)
        except (ImportError, TypeError, ValueError) as error:
            wrong[name] = str(error)
    return found, wrong


def _names() -> list[str]:
    return list(dict.fromkeys([*_shipped_passes(), *sorted(entry_points(group=GROUP).names)]))


def find_pass(name: str) -> type[Any]:
    """The class of the pass with this recipe key. Of other packages, only the one that registers it is imported.

    Raises:
        ImportError, TypeError: as `known_passes`, for this name.
        ValueError: as `known_passes`, for this name; or there is no such pass, and the message lists what there is.
    """
    shipped = _shipped_passes()
    registered = entry_points(group=GROUP)
    points = [point for point in registered if point.name == name]
    owners = ["vlmrewrite"] * (name in shipped) + sorted(_package(point) for point in points)
    if len(owners) > 1:
        raise ValueError(f"expected one package to have a pass {name!r}, got {', '.join(owners)}; uninstall the others")
    if not owners:
        names = [*shipped, *sorted(registered.names)]
        raise ValueError(f"unknown pass {name!r}, {one_of(name, names)}")
    return shipped[name] if name in shipped else _registered_pass(points[0])


def _shipped_passes() -> dict[str, type[Any]]:
    module = importlib.import_module("vlmrewrite.passes")  # here, not above: the core knows no technique
    return {getattr(module, item).name: getattr(module, item) for item in module.__all__}


def _registered_pass(point: EntryPoint) -> type[Any]:
    what = f"the package {_package(point)} registers the pass {point.name!r} as {point.value!r}"
    try:
        found: type[Any] = point.load()
    except BaseException as error:  # what another package does when it is imported must not end the process
        raise ImportError(f"{what}, which cannot be loaded: {type(error).__name__}: {error}") from error
    if not is_pass_class(found):
        raise TypeError(f"{what}: expected a class made with vlmrewrite.plan.frozen_pass, got {found!r}")
    if found.name != point.name:
        raise ValueError(f"{what}: expected a class whose `name` is {point.name!r}, got {found.name!r}")
    return found


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "(unknown)"


def is_pass_class(cls: Any) -> bool:
    """Whether a class is made with :func:`vlmrewrite.plan.frozen_pass`."""
    return is_pydantic_dataclass(cls) and isinstance(getattr(cls, "name", None), str)


def as_passes(value: object) -> tuple[object, ...]:
    """A recipe's passes, checked; for pydantic.

    Raises:
        ValueError: it is no list, or something in it is not a pass.
    """
    if not isinstance(value, list | tuple):
        raise ValueError(f"expected a list of passes, got {shown(value)}")
    for i, item in enumerate(value):
        if isinstance(item, type) and is_pass_class(item):
            raise ValueError(f"expected a pass as item {i}, got the class {item.__name__}; write {item.__name__}(...)")
        if not is_pass_class(type(item)):
            raise ValueError(f"expected a pass (a class made with frozen_pass) as item {i}, got {shown(item)}")
    return tuple(value)


def layers_named(item: Any) -> Iterator[tuple[str, int]]:
    """The layers that a pass's options name by number, each with its key."""
    hints = typing.get_type_hints(type(item), include_extras=True)
    for field in dataclasses.fields(item):
        value = getattr(item, field.name)
        if not _holds_layers(hints[field.name]):
            continue
        listed = isinstance(value, list | tuple)
        for i, at in enumerate(value if listed else [value]):
            if type(at) is int:
                yield f"{field.name}[{i}]" if listed else field.name, at


def _holds_layers(hint: Any) -> bool:
    """Whether a type is a depth or layers, or may be one."""
    checks = [typing.get_args(kind)[1] for kind in (Depth, Layers)]
    return hint in checks or any(map(_holds_layers, typing.get_args(hint)))
