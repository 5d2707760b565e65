"""How the code is laid out: what `make lint` does not see of it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tools.lines import check, code_lines
from vlmrewrite import passes

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

GENERIC = {"Downsample", "Random", "Stride"}
"""Passes whose names are words like any other: the core may use the words, but not make the passes."""

NAMED = {
    # The first thing a user reads needs a recipe that is there.
    "vlmrewrite/__init__.py": {"sts-128"},
    # An error message shows what a pass looks like.
    "vlmrewrite/plan/pipeline.py": {"STS("},
}
"""Where the core names a technique nevertheless, and how. It can only shrink."""

LONG = {
    "tests/kernels/test_attention.py": 370,
    "tests/kernels/test_sample.py": 350,
    "tests/graph/test_dape.py": 420,
    "tests/graph/test_profile.py": 310,
    "tests/models/test_relatives.py": 470,
    "tests/graph/test_tokenwise.py": 440,
}
"""Files of more than 300 lines, and how many they may have. It can only shrink."""

REACHED: dict[str, list[str]] = {}
"""What is imported past the ``__init__`` of a package nevertheless. It can only shrink."""

OPEN = {"bench", "cli", "harness", "kernels", "passes", "testing"}
"""Packages whose modules are imported by themselves: their ``__init__`` would load what may not be there."""


def sources(*folders: str) -> list[Path]:
    """Python files by their paths in the repository, those behind the links once."""
    found = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [path for path in sorted(found) if path.resolve() == path]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> list[str]:
    """What a module imports, wherever in it, with the names that are taken: ``package.module.name``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:  # relative ones stay where they are
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def techniques() -> re.Pattern[str]:
    """Names and recipe keys of the passes as words, also within identifiers; of the generic ones, their constructors.

    With what is written on to the next space or sign.
    """
    classes = [name for name in passes.__all__ if name not in GENERIC]
    keys = {word for name in classes for word in (name.lower(), getattr(passes, name).name)}
    anywhere = rf"(?i:(?<![a-z])(?:{'|'.join(sorted(keys))})(?![a-z]))"
    in_camels = rf"(?<![A-Z])(?:{'|'.join(classes)})(?=[A-Z][a-z])"
    made = rf"\b(?:{'|'.join(sorted(GENERIC))})(?=\()"
    return re.compile(rf"(?:{anywhere}|{in_camels}|{made})[-'\w]*\(?")


def core() -> list[Path]:
    outside = re.compile(r"vlmrewrite/(testing/|bench/|moved\.py)")
    return [path for path in sources("vlmrewrite") if not outside.match(name_of(path))]


@pytest.mark.parametrize(
    ("text", "hits"),
    [
        ("def sts_sample(x): ...", ["sts_sample("]),
        ("class DAPELoss: ...", ["DAPELoss"]),
        ("`DivPrune` and fastv2, ViCA's", ["DivPrune", "fastv2", "ViCA's"]),
        ("Random(keep=1), Stride.keep, Random", ["Random("]),
        ("hosts lists tests consists; advisory; FastVLM; random stride", []),
    ],
)
def test_the_names_that_are_looked_for(text: str, hits: list[str]) -> None:
    assert techniques().findall(text) == hits


def test_the_core_names_no_technique() -> None:
    pattern = techniques()
    found = {name_of(path): set(pattern.findall(path.read_text())) for path in core()}
    assert len(found) > 90
    assert {name: words for name, words in found.items() if words} == NAMED


def test_the_core_imports_no_pass() -> None:
    for path in core():
        taken = [name for name in imported(ast.parse(path.read_text())) if f"{name}.".startswith("vlmrewrite.passes.")]
        assert not taken, f"{name_of(path)} imports {taken}"


def exported(package: Path) -> list[str]:
    """The ``__all__`` of a package."""
    init = package / "__init__.py"
    for node in ast.parse(init.read_text()).body if init.is_file() else ():
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def past_an_init(path: Path) -> list[str]:
    """Imports that reach into a package of vlmrewrite from outside of it."""
    home = path.relative_to(ROOT).parts
    wrong = []
    for name in imported(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] != "vlmrewrite" or len(parts) < 3 or parts[1] in OPEN or home[:2] == ("vlmrewrite", parts[1]):
            continue
        inner = ROOT.joinpath(*parts[:3])
        if len(parts) == 3 and parts[2] in exported(inner.parent):  # a function may be called like its module
            continue
        if inner.is_dir() or inner.with_suffix(".py").is_file():
            wrong.append(name)
    return wrong


def test_packages_are_imported_by_their_init() -> None:
    found = {name_of(path): past_an_init(path) for path in sources("vlmrewrite", "passes", "recipes", "examples")}
    assert {name: wrong for name, wrong in found.items() if wrong} == REACHED, "expected what the packages export"


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("from vlmrewrite.plan.tokens import All", True),
        ("from vlmrewrite.plan import tokens", True),
        ("import vlmrewrite.plan.tokens", True),
        ("from vlmrewrite.plan import All", False),
        ("from vlmrewrite.plan import narrow", False),
        ("from vlmrewrite.plan.narrow import narrow", True),
        ("from vlmrewrite.kernels.launch import splits", False),
        ("from vlmrewrite.recipe import Recipe", False),
        ("from vlmrewrite import ops", False),
    ],
)
def test_what_reaches_past_an_init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, wrong: bool) -> None:
    house = tmp_path / "vlmrewrite"
    for name in ("plan/tokens.py", "kernels/launch.py", "recipe.py", "rewrite/new.py"):
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_text(line)
    (house / "plan" / "__init__.py").write_text('__all__ = ["All", "narrow"]')
    (house / "plan" / "narrow.py").write_text("")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert bool(past_an_init(house / "rewrite" / "new.py")) is wrong
    assert not past_an_init(house / "plan" / "tokens.py")


def test_files_are_short() -> None:
    lengths = {
        name_of(path): len(path.read_text().splitlines())
        for path in sources("vlmrewrite", "passes", "examples", "benchmarks", "tools", "tests")
    }
    assert not {name for name, n in lengths.items() if n > LONG.get(name, 300)}, "expected at most so many lines"
    assert set(LONG) <= {name for name, n in lengths.items() if n > 300}, "no longer long: take it off the list"


def test_what_counts_as_code() -> None:
    source = (
        '"""Two\n\nlines."""\n\n# no\nx = 1  # yes\n"""Of x."""\n\n\ndef f():\n    "No."\n    return """\nyes\n"""\n'
    )
    assert code_lines(source) == 5


@pytest.mark.parametrize(
    ("allowed", "last", "kept"),
    [
        (2, r"expected at most 2 lines .* got 3: .* raise compiler-lines .* says why", False),
        (3, r"in all +3 of 3", True),
        (23, r"in all +3 of 23", True),
        (24, r"lower compiler-lines in pyproject\.toml to 3", True),
    ],
)
def test_the_ratchet(tmp_path: Path, allowed: int, last: str, kept: bool) -> None:
    for name in ("plan/a.py", "rewrite/inner/b.py", "report/c.py"):
        path = tmp_path / "vlmrewrite" / name
        path.parent.mkdir(parents=True)
        path.write_text("x = 1\n" * (1 + name.startswith("plan")))
    (tmp_path / "pyproject.toml").write_text(f"[tool.vlmrewrite]\ncompiler-lines = {allowed}\n")
    said, within = check(tmp_path)
    assert within is kept
    assert re.search(last, said[-1])


def test_the_bounds_agree() -> None:
    from vlmrewrite.compat import TESTED

    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *extras["triton"]]
    assert {f"{package}{bounds}" for package, bounds in TESTED.items()} <= set(asked)
    assert f"triton{TESTED['triton']}" in extras["dev"]
    pins = re.search(r"OLDEST_PINS := (.*)", (ROOT / "Makefile").read_text())
    assert pins is not None
    least = {package: re.findall(r"[\d.]+", bounds)[0] for package, bounds in TESTED.items()}
    assert dict(pin.split("==") for pin in pins[1].split()) == {name: f"{version}.0" for name, version in least.items()}


def test_the_rules_of_who_imports_whom_can_break(tmp_path: Path) -> None:
    """The linter reads the folder behind the link: a pass that imports another pass, or the core a pass, is found."""
    pytest.importorskip("importlinter")
    tree = tmp_path / "vlmrewrite"
    for name in ("__init__.py", "plan/__init__.py", "kernels/__init__.py", "testing/__init__.py", "report.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("")
    (tree / "kernels" / "k.py").write_text("def f():\n    from vlmrewrite.plan import Plan\n")
    (tree / "report.py").write_text("from vlmrewrite.testing import x\n\nfrom vlmrewrite.passes.one import One\n")
    (tmp_path / "passes").mkdir()
    (tree / "passes").symlink_to("../passes")
    for name, text in (("__init__", ""), ("one", ""), ("two", "from vlmrewrite.passes.one import One\n")):
        (tmp_path / "passes" / f"{name}.py").write_text(text)
    contracts = PROJECT["tool"]["importlinter"]["contracts"]
    lines = ["[importlinter]", "root_package = vlmrewrite"]
    for i, contract in enumerate(contracts[1:]):
        lines.append(f"[importlinter:contract:{i}]")
        settings = {key: value for key, value in contract.items() if key != "ignore_imports"}
        for key in ("source_modules", "modules"):
            if key in settings:
                settings[key] = [name for name in settings[key] if "*.kernels" not in name]
        lines += [f"{k} = " + ("\n    ".join(["", *v]) if isinstance(v, list) else str(v)) for k, v in settings.items()]
    (tmp_path / ".importlinter").write_text("\n".join(lines))
    run = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command as c; c(['--no-cache'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", run], cwd=tmp_path, capture_output=True, text=True, env={"PATH": "", "COLUMNS": "200"}
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for contract in contracts[1:]:
        assert re.search(rf"{re.escape(contract['name'])} BROKEN", done.stdout), done.stdout
