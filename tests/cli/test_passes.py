"""`vlmrewrite passes`: every pass and its options, in words."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import Field
from typer.testing import CliRunner

from vlmrewrite import plan
from vlmrewrite.cli import catalogue
from vlmrewrite.cli.app import app
from vlmrewrite.plan import Depth
from vlmrewrite.recipe import shipped_recipes
from vlmrewrite.registry import known_passes

ROOT = Path(__file__).parents[2]


def output(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_passes() -> None:
    text = output("passes")
    assert "keep: Budget = 192" in text
    assert "refine: Budget | None = 64" in text
    assert "fuse: int of at least 0 = 1" in text
    assert "seed: int in [0, 4294967296) = 0" in text
    assert "policy: 'confidence' | 'router' | function | None = None" in text
    assert "cross: Layers | None = None" in text and "cross: Layers = ()" in text
    assert not re.search(r"typing|collections|Annotated|``", text)
    found = {p["name"]: p for p in json.loads(output("passes", "--json", "-"))}
    assert list(found) == list(known_passes())
    assert found["stride"] == {
        "name": "stride",
        "description": "Keep evenly spaced vision tokens from layer `at` on.",
        "package": "vlmrewrite",
        "options": [
            {"name": "keep", "type": "Budget", "required": True},
            {"name": "at", "type": "Depth", "required": False, "default": 0},
            {"name": "per", "type": "'frame' | 'image' | 'row'", "required": False, "default": "image"},
        ],
    }
    assert found["sts"]["options"][3] == {
        "name": "features",
        "type": "'projected' | 'encoder'",
        "required": False,
        "default": "projected",
    }


def test_passes_fit_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for width in (80, 60):
        monkeypatch.setenv("COLUMNS", str(width))
        lines = output("passes").splitlines()
        assert max(map(len, lines)) <= width
        at = lines.index("    keep: Budget = 192")
        assert lines[at + 1 : at + 4] == [
            "    refine: Budget | None = 64",
            "    at: Depth = 0.5",
            "    features: 'projected' | 'encoder' = 'projected'",
        ]


@pytest.mark.parametrize(
    ("hint", "name"),
    [
        (Annotated[int, Field(gt=3)], "int above 3"),
        (Annotated[float, Field(ge=0, lt=1)], "float in [0, 1)"),
        (Annotated[float, Field(le=2.5)] | None, "float of at most 2.5 | None"),
        (Annotated[Depth, Field(description="where")], "Depth"),
        (tuple[int, ...] | list[int], "list of int"),
        (dict[str, int], "mapping"),
        (Callable[[int], int], "function"),
        (Any, "anything"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_types_in_words(hint: Any, name: str) -> None:
    assert catalogue.type_name(hint, vars(plan)) == name


def test_the_sources_say_of_passes_and_recipes_what_the_classes_say() -> None:
    assert catalogue.passes() == catalogue.passes_by_class()
    assert catalogue.recipes() == [catalogue.recipe_data(recipe) for recipe in shipped_recipes().values()]


LIGHT = """
import sys
from vlmrewrite.cli import app
try:
    app(sys.argv[1:])
except SystemExit as done:
    assert done.code == 0, done
assert not {"torch", "transformers", "numpy"} & set(sys.modules), "it takes seconds to import them"
"""


@pytest.mark.parametrize(
    "arguments", ["recipes", "recipes --json -", "passes", "passes --json -", "--version", "--help", "apply --help"]
)
def test_what_there_is_is_told_without_torch(arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *arguments.split()], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout, done.stderr
