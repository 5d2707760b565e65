"""What the passes that come with vlmrewrite are called and take, read off their sources: nothing, and no torch, is run.

A class is looked at as it is written; of the names in it, those of vlmrewrite are looked up in its sources too, and
those of other packages (``typing``, ``pydantic``) imported.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, get_origin

import yaml

ROOT = Path(__file__).parents[1]


class Option(NamedTuple):
    """A field of a pass: its type, and its default value, which is ``dataclasses.MISSING`` if there is none."""

    hint: Any
    default: Any


class Written(NamedTuple):
    """A pass as it is written: its docstring, and its options by name, in order."""

    doc: str
    options: dict[str, Option]


@functools.cache
def shipped_passes() -> dict[str, Written]:
    """The passes of ``vlmrewrite.passes``, by their recipe keys, in its order."""
    package = source("passes")
    return dict(_pass(*package.home(name)) for name in package["__all__"])


def shipped_recipes() -> list[dict[str, Any]]:
    """The recipes of ``vlmrewrite.recipes``, by name: their fields, and name and all options of each pass."""
    return [_recipe(yaml.safe_load(file.read_bytes())) for file in sorted((ROOT / "recipes").glob("*.yaml"))]


def _recipe(written: dict[str, Any]) -> dict[str, Any]:
    passes = []
    for one in written.pop("passes"):
        [(name, given)] = one.items() if isinstance(one, dict) else [(one, {})]
        values = {key: option.default for key, option in shipped_passes()[name].options.items()}
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
        passes.append({"name": name, "options": values | given})
    return written | {"passes": passes}


def _pass(module: _Source, node: ast.ClassDef) -> tuple[str, Written]:
    fields = {x.target.id: x for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)}
    options = {}
    for name, field in fields.items():
        hint = module.value(field.annotation)
        if get_origin(hint) is not ClassVar:
            made = dataclasses.MISSING if field.value is None else module.value(field.value)
            options[name] = Option(hint, made.default if isinstance(made, dataclasses.Field) else made)
    key = fields["name"].value
    assert key is not None
    return module.value(key), Written(ast.get_docstring(node) or "", options)


class _Source(dict[str, Any]):
    """The names of a module of vlmrewrite, each found when it is asked for."""

    def __init__(self, *path: str) -> None:
        folder = ROOT.joinpath(*path)
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        self.written = dict(_names(ast.parse(file.read_bytes())))

    def value(self, node: ast.expr) -> Any:
        """What an expression is."""
        return eval(compile(ast.Expression(node), "<source>", "eval"), {}, self)

    def home(self, name: str) -> tuple[_Source, Any]:
        """The module that defines a name, and where it does."""
        node = self.written[name]
        if isinstance(node, ast.ImportFrom) and (module := node.module or "").startswith("vlmrewrite."):
            return source(*module.split(".")[1:]).home(name)
        return self, node

    def __missing__(self, name: str) -> Any:
        if name not in self.written:
            return getattr(builtins, name)
        module, node = self.home(name)
        if module is not self:
            self[name] = module[name]
        elif isinstance(node, ast.ImportFrom):
            self[name] = getattr(importlib.import_module(node.module or ""), name)
        elif isinstance(node, ast.Import):
            self[name] = importlib.import_module(name)
        else:
            self[name] = self.value(node) if isinstance(node, ast.expr) else lambda *_: None  # not looked into
        return self[name]


@functools.cache
def source(*path: str) -> _Source:
    """The module of vlmrewrite at a path, such as ``"plan", "budget"``."""
    return _Source(*path)


def _names(module: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    for node in module.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.name, node) for alias in node.names if alias.asname is None)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, node
        elif isinstance(node, ast.Assign):
            yield from ((target.id, node.value) for target in node.targets if isinstance(target, ast.Name))
