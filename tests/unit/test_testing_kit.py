"""What the testing kit gives by its own name, with and without hypothesis."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from vlmrewrite import testing
from vlmrewrite.testing import agreement, models, strategies

ROOT = Path(__file__).parents[2]


def public(module):
    """The functions and classes that a module of the kit makes."""
    own = {name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__}
    return {name for name in own if not name.startswith("_")}


def test_the_kit_gives_what_its_modules_make():
    made = public(agreement) | public(strategies) | {"FAMILIES", "ZOO", "Row", "Side", "TinyVLM"}
    assert made == set(testing.__all__)
    assert made - public(agreement) - public(strategies) <= set(models.__all__)
    for name in testing.__all__:
        assert getattr(testing, name) is getattr(sys.modules[f"vlmrewrite.testing.{testing._HOMES[name]}"], name)
    assert {"generation_agreement", "strategies", "models"} <= set(dir(testing))


@pytest.mark.slow
def test_from_testing_import_generation_agreement():
    code = "from vlmrewrite.testing import generation_agreement, Row, rows, strategies; print(Row, rows())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "rows" in done.stdout or "lists" in done.stdout


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="has no attribute 'family'; expected one of FAMILIES, ZOO, Agreement"):
        testing.family  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'family'"):
        exec("from vlmrewrite.testing import family")


WITHOUT = """
import sys
sys.modules["hypothesis"] = None  # as if it were not installed
import vlmrewrite.testing
from vlmrewrite.testing import FAMILIES, Agreement, Row, generation_agreement
assert FAMILIES["llava"]().inputs([Row(1)])
for statement in sys.argv[1:]:
    try:
        exec(statement)
    except ImportError as error:
        print(error)
"""


@pytest.mark.slow
def test_only_the_strategies_need_hypothesis():
    asked = [
        "from vlmrewrite.testing import rows",
        "from vlmrewrite.testing import strategies",
        "import vlmrewrite.testing.strategies",
        "vlmrewrite.testing.pass_lists(4)",
    ]
    done = subprocess.run([sys.executable, "-c", WITHOUT, *asked], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = "vlmrewrite.testing.strategies needs hypothesis, which is not installed: pip install 'vlmrewrite[testing]'"
    assert done.stdout.splitlines() == [said] * len(asked)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["testing"] == ["hypothesis"]
    assert "hypothesis" in extras["dev"]
