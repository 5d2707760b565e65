"""A user's typed file uses every public name, and does what it says; that it is typed, `make typecheck` checks."""

from __future__ import annotations

import ast
import pydoc
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

import vlmrewrite as vr
from tests.typing import every_name
from vlmrewrite import passes
from vlmrewrite.plan import Pass
from vlmrewrite.testing.models import Row

ROOT = Path(__file__).parents[2]
FILE = ROOT / "tests" / "typing" / "every_name.py"


def test_it_uses_every_public_name() -> None:
    tree = ast.parse(FILE.read_text())
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {f"vr.{name}" for name in vr.__all__} <= used
    assert {f"passes.{name}" for name in passes.__all__} <= used
    assert "type: ignore" not in FILE.read_text()
    files = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    assert "tests/typing" in files


def test_every_pass_is_one() -> None:
    assert all(isinstance(p, Pass) for p in every_name.every_pass())


@torch.no_grad()
def test_it_runs(llava, tmp_path: Path) -> None:
    told = every_name.use(llava.model, llava.inputs([Row(1, 2, 3)]), tmp_path)
    assert told[0] == "mine" and re.fullmatch(r"\(\d.*\): \d+", told[-1])


@pytest.mark.slow
def test_names_are_found_when_they_are_asked_for() -> None:
    code = "import sys, vlmrewrite as vr; assert 'torch' not in sys.modules; assert 'apply' in dir(vr)\n"
    code += "from vlmrewrite.report import LayerProfile; assert callable(vr.report) and callable(vr.rewrite)\n"
    code += "assert vr.passes.STS(keep=3).keep == 3\n"
    code += "from vlmrewrite import *; assert set(vr.__all__) <= set(dir()), dir()\n"
    code += "try: vr.nothing\nexcept AttributeError as e: print(e)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "module 'vlmrewrite' has no attribute 'nothing'\n"), done.stderr


def test_options_come_first_in_the_help_of_a_pass() -> None:
    for name in passes.__all__:
        text = pydoc.plain(pydoc.render_doc(getattr(passes, name)))
        assert name in text.split("Args:")[0] and "Args:" in text.split("Methods defined here")[0], name
