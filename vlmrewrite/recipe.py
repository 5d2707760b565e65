"""Recipes: a list of passes with a name, read from YAML strictly and written back, and where the passes are found."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Hashable
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, TypeAdapter, ValidationError

from vlmrewrite import moved
from vlmrewrite.errors import explain, one_of, plain_name, shown
from vlmrewrite.markup import heading, items
from vlmrewrite.registry import as_passes, find_pass, is_pass_class, layers_named
from vlmrewrite.registry import known_passes as known_passes

LARGEST = 1_000_000
"""Bytes of a recipe file."""


class Recipe(BaseModel):
    """What `apply` does to a model: passes, in order, and how the rewritten graph is run.

    Attributes:
        name: what reports call it; of a shipped recipe, also the name of its file.
        description: one line.
        passes: the passes, in the order in which they are asked.
        backend: `"eager"`; `"inductor"`, each kind of layer once, or `"inductor-whole"`; `"auto"` is inductor on a GPU.
        kernels: `"reference"` is plain PyTorch, `"triton"` the kernels, `"auto"` chooses by device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str = Field(min_length=1)
    description: str = ""
    passes: Annotated[tuple[Any, ...], BeforeValidator(as_passes)]
    backend: Literal["auto", "eager", "inductor", "inductor-whole"] = "auto"
    kernels: Literal["auto", "reference", "triton"] = "auto"
    _source: str = PrivateAttr("")

    def __eq__(self, other: object) -> bool:
        """Whether the fields are equal, whatever file each was read from."""
        return isinstance(other, Recipe) and dict(self) == dict(other)

    @property
    def source(self) -> str:
        """The file it was read from; empty if it was made otherwise."""
        return self._source

    def _repr_html_(self) -> str:
        about = f"backend {self.backend}, kernels {self.kernels}" + (f", from {self.source}" if self.source else "")
        parts = [heading(f"Recipe {self.name}", 3), items(filter(None, [self.description, about]))]
        return "".join(["<div>", *parts, heading("Passes, in order"), items(map(repr, self.passes)), "</div>"])

    @property
    def sets_processor(self) -> bool:
        """Whether a pass works by way of the processor, so that inputs have to be made with :meth:`processor`."""
        return any(hasattr(item, "processor") for item in self.passes)

    def processor(self, processor: Any) -> Any:
        """A processor as the passes need it, a copy if one sets it; ValueError if it cannot be set so."""
        setting = (item.processor for item in self.passes if hasattr(item, "processor"))
        return functools.reduce(lambda made, sets: sets(made), setting, processor)

    def check_layers(self, depth: int) -> None:
        """Whether a decoder of `depth` layers has the layers that the options of the passes name.

        Raises:
            ValueError: it lacks one. One line for each option, with the file, the key, the value and what was expected.
        """
        problems = []
        for i, item in enumerate(self.passes):
            where = f"{self._source}: passes[{i}].{item.name}" if self._source else type(item).__name__
            for key, value in layers_named(item):
                if value >= depth:
                    expected = f"expected a layer in 0 .. {depth - 1} (the decoder has {depth})"
                    problems.append(f"{where}.{key}: {expected}, got {value}")
        if problems:
            raise ValueError("\n".join(problems))

    @classmethod
    def of(cls, recipe: object) -> Self:
        """The recipe that is meant: a recipe, a shipped name, a path, one pass or a sequence of passes.

        Passes become a recipe called "custom".

        Raises:
            FileNotFoundError: the path is no file.
            ValueError: none of these; or as `load`.
        """
        if isinstance(recipe, cls):
            return recipe
        if isinstance(recipe, str | os.PathLike):
            return cls.load(recipe)
        if is_pass_class(type(recipe)):
            return cls(name="custom", passes=(recipe,))
        if not isinstance(recipe, list | tuple):
            expected = "a recipe, its name or path, a pass (a class made with frozen_pass) or a list of passes"
            raise ValueError(f"expected {expected}, got {shown(recipe)}")
        try:
            return cls(name="custom", passes=tuple(recipe))
        except ValidationError as error:
            raise ValueError("\n".join(explain(error, "", list(cls.model_fields)))) from None

    @classmethod
    def load(cls, name_or_path: str | os.PathLike[str]) -> Self:
        """Loads a shipped recipe by its name, or a file.

        A path object is a file, and so is a string that ends in .yaml or .yml or contains a path separator. Of a name,
        case does not matter, and _ may stand for -.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: there is no such shipped recipe, and the message lists what there is; or as `from_yaml`.
        """
        name = os.fspath(name_or_path)
        separators = {os.sep, os.altsep or os.sep}
        if not isinstance(name_or_path, str) or name.endswith((".yaml", ".yml")) or separators & set(name):
            return cls.from_yaml(name_or_path)
        name = next((known for known in shipped_names() if known == plain_name(name)), name)
        if name not in shipped_names():
            raise ValueError(f"unknown recipe {name!r}, {one_of(name, shipped_names())}, or a path ending in .yaml")
        return cls._parse(files("vlmrewrite.recipes").joinpath(f"{name}.yaml").read_bytes(), f"recipes/{name}.yaml")

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a recipe file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a recipe. One line for each thing that is wrong, with the file, the key, the
                value and what was expected.
            ImportError, TypeError: a pass of another package cannot be loaded, see `known_passes`.
        """
        file = Path(path)
        if not file.is_file():
            raise FileNotFoundError(f"expected a recipe file, got {os.fspath(path)!r}, which is not a file")
        if (size := file.stat().st_size) > LARGEST:
            raise ValueError(f"{os.fspath(path)}: expected a recipe file of at most {LARGEST:,} bytes, got {size:,}")
        return cls._parse(file.read_bytes(), os.fspath(path))

    def to_data(self) -> dict[str, Any]:
        """What YAML and JSON can hold, from which `of_data` makes an equal recipe.

        Raises:
            ValueError: a pass is not registered, so that it could not be found again.
        """
        passes: list[object] = []
        for item in self.passes:
            if find_pass(item.name) is not type(item):
                raise ValueError(f"expected a pass of {find_pass(item.name)}, got one of {type(item)}")
            options = TypeAdapter(type(item)).dump_python(item, mode="json")
            passes.append({item.name: options} if options else item.name)
        data = {**self.model_dump(exclude={"passes", "backend", "kernels"}), "passes": passes}
        return data | {"backend": self.backend, "kernels": self.kernels}

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Writes a file from which `from_yaml` makes an equal recipe; an existing file is overwritten.

        Raises:
            ValueError: as `to_data`.
        """
        data = self.to_data()
        how: dict[str, Any] = {"sort_keys": False, "default_flow_style": None, "width": 120}
        text = yaml.dump(data, Dumper=_PlainDumper, allow_unicode=True, **how)
        if yaml.load(text, Loader=_StrictLoader) != data:  # line separators of Unicode, which PyYAML does not escape
            text = yaml.dump(data, Dumper=_PlainDumper, **how)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def _parse(cls, content: bytes, source: str) -> Self:
        try:
            data = yaml.load(content, Loader=_StrictLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise ValueError(f"{source}{at}: expected valid YAML: {error.problem}") from None
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{source}: expected valid YAML: {' '.join(str(error).split())}") from None
        return cls.of_data(data, source)

    @classmethod
    def of_data(cls, data: object, source: str) -> Self:
        """The recipe that a mapping describes.

        Args:
            data: as `to_data` gives it.
            source: the file that it is from, for messages.

        Raises:
            ValueError: it is no recipe. One line for each thing that is wrong.
        """
        if not isinstance(data, dict):
            got = "nothing" if data is None else shown(data)
            raise ValueError(f"{source}: expected a mapping with the keys {', '.join(cls.model_fields)}, got {got}")
        data, problems = dict(data), list[str]()
        if isinstance(data.get("passes"), list):
            data["passes"] = [_read_pass(item, f"passes[{i}]", problems) for i, item in enumerate(data["passes"])]
            if problems:
                data["passes"] = ()
        try:
            recipe = cls.model_validate(data)
        except ValidationError as error:
            problems += explain(error, "", list(cls.model_fields))
        if problems:
            raise ValueError("\n".join(f"{source}: {problem}" for problem in problems))
        recipe._source = source
        return recipe


def shipped_recipes() -> dict[str, Recipe]:
    """The recipes that come with vlmrewrite, by name, sorted."""
    return {name: Recipe.load(name) for name in shipped_names()}


def shipped_names() -> list[str]:
    """The names of the recipes that come with vlmrewrite, sorted."""
    names = [item.name for item in files("vlmrewrite.recipes").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _read_pass(item: object, where: str, problems: list[str]) -> object:
    """The pass that one entry of `passes` describes; what is wrong is added to `problems`."""
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, dict) or len(item) != 1 or not isinstance(next(iter(item)), str):
        problems.append(
            f"{where}: expected the name of a pass, or a mapping `name: {{option: value}}`, got {shown(item)}"
        )
        return None
    [(name, options)] = item.items()
    if not isinstance(options, dict):
        problems.append(f"{where}.{name}: expected a mapping of options, got {shown(options)}")
        return None
    try:
        cls = find_pass(name)
        # Strict JSON mode lets a YAML list fill a tuple and converts nothing else.
        return TypeAdapter(cls).validate_json(json.dumps(options))
    except ValidationError as error:
        problems += explain(error, f"{where}.{name}", [field.name for field in dataclasses.fields(cls)])
    except ValueError as error:
        problems.append(f"{where}: {error}")
    return None


class _PlainDumper(yaml.SafeDumper):
    """YAML without aliases: what stands twice is written twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


class _StrictLoader(yaml.SafeLoader):
    """YAML whose values are those of JSON, in which no key stands twice, and nothing stands for something else."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(
                problem=f"expected the value itself, got the alias *{alias.anchor}", problem_mark=alias.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key.value in (earlier.value for earlier in keys[:i]):
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_constructors = {
    tag: yaml.SafeLoader.construct_yaml_str if tag == "tag:yaml.org,2002:timestamp" else constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag not in {f"tag:yaml.org,2002:{kind}" for kind in ("binary", "omap", "pairs", "set")}
}

moved.register(__name__)
