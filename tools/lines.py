"""Lines of code of the compiler's stages, by folder, held to the number in pyproject.toml.

Docstrings, comments and blank lines do not count. The number is a ratchet: code that grows past it fails `make lint`
until the number is raised, by a commit that says why; where it has become loose, that is said, so that it is lowered.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from pathlib import Path

STAGES = ("plan", "capture", "analysis", "rewrite", "lower", "runtime", "oracle", "kvcache")
LOOSE = 20
"""Lines that the number may be above the count without a word."""


def code_lines(source: str) -> int:
    """How many lines of a module are neither blank nor a comment, and no part of a docstring."""
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            texts.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [line.strip() for line in source.splitlines()]
    return sum(bool(line) and not line.startswith("#") and i not in texts for i, line in enumerate(lines, 1))


def check(root: Path) -> tuple[list[str], bool]:
    """A line for each folder, the total and what is to be done about it; and whether the total is within its bound."""
    allowed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["vlmrewrite"]["compiler-lines"]
    counts = {
        stage: sum(code_lines(path.read_text()) for path in (root / "vlmrewrite" / stage).rglob("*.py"))
        for stage in STAGES
    }
    total = sum(counts.values())
    said = [f"{stage:10} {n:5}" for stage, n in counts.items()] + [f"{'in all':10} {total:5} of {allowed}"]
    if total > allowed:
        said.append(
            f"expected at most {allowed} lines of code in the compiler's stages, got {total}: make them shorter, or"
            " raise compiler-lines in pyproject.toml in a commit that says why"
        )
    elif total < allowed - LOOSE:
        said.append(f"the bound is loose: lower compiler-lines in pyproject.toml to {total}")
    return said, total <= allowed


if __name__ == "__main__":
    said, kept = check(Path(__file__).parents[1])
    print(*said, sep="\n")
    sys.exit(not kept)
