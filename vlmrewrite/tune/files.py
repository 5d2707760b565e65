"""A recipe on disk, with what was found beside it: a YAML file, and by the same name JSON and a page."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vlmrewrite.evaluate import write_whole
from vlmrewrite.tune.page import page
from vlmrewrite.tune.results import Tuned


def check_output(output: str | os.PathLike[str] | None) -> Path | None:
    """The path of the recipe.

    Raises:
        ValueError: it is none, its folder is not there, or there is a file of its name or beside it already.
    """
    if output is None:
        return None
    path = Path(output)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"output: expected a file that ends in .yaml, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"output: expected a file in a folder that exists, got {str(path)!r}")
    for file in (path, *_beside(path)):
        if file.exists():
            raise ValueError(f"output: {str(file)!r} is there already: expected another name, or remove it first")
    return path


def write(path: Path, found: Tuned) -> None:
    """Write what was found, each file whole or not at all, the recipe last and only if it meets the wish."""
    data, html = _beside(path)
    write_whole(html, page(found))
    write_whole(data, json.dumps(found.to_dict(), indent=1) + "\n")
    if found.recipe is not None:
        part = path.with_name(f".{path.name}.part")
        found.recipe.to_yaml(part)
        part.replace(path)


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".json"), path.with_suffix(".html")
