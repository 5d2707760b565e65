"""A recipe on disk, with what was found beside it: a YAML file, and by the same name JSON and a page."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

from vlmrewrite.tune.page import page
from vlmrewrite.tune.results import Tuned


def check_output(output: str | os.PathLike[str] | None) -> Path | None:
    """The path of the recipe.

    Raises:
        ValueError: it is none, its folder is not there or takes no files, or there is a file of its name or beside it
            already.
    """
    if output is None:
        return None
    path = Path(output)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"output: expected a file that ends in .yaml, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"output: expected a file in a folder that exists, got {str(path)!r}")
    _refuse_old(path)
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        raise ValueError(f"output: expected a file in a folder that can be written, got {str(path)!r}: {e}") from e
    return path


def write(path: Path, found: Tuned) -> None:
    """Write what was found, each file whole or not at all, the recipe last and only if it meets the wish.

    Raises:
        ValueError: one of the files came to be since :func:`check_output`. None is written.
    """
    data, html = _beside(path)
    parts = {file: file.with_name(f".{file.name}.part") for file in (html, data, path)}
    try:
        parts[html].write_text(page(found), encoding="utf-8")
        parts[data].write_text(json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if found.recipe is not None:
            found.recipe.to_yaml(parts[path])
        _refuse_old(path, f"; the recipe that was found is {', '.join(map(repr, found.best.passes))}")
        for file, part in parts.items():
            if file != path or found.recipe is not None:
                part.replace(file)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _refuse_old(path: Path, more: str = "") -> None:
    for file in (path, *_beside(path)):
        if file.exists():
            raise ValueError(f"output: {str(file)!r} is there already: expected another name, or remove it first{more}")


def _beside(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".json"), path.with_suffix(".html")
