"""The package as it is installed, and passes that other packages bring."""

import importlib.util
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from vlmrewrite.cli import app
from vlmrewrite.passes import Stride
from vlmrewrite.recipe import Recipe
from vlmrewrite.registry import GROUP, find_pass, known_passes

ROOT = Path(__file__).parents[2]


def test_pyproject_names_every_package() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    own = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("vlmrewrite/**/__init__.py")}
    linked = {f"vlmrewrite.{'.'.join(p.parent.relative_to(ROOT).parts)}" for p in ROOT.glob("passes/**/__init__.py")}
    found = own | linked | {"vlmrewrite.recipes"}
    assert set(setuptools["packages"]) == found
    for name, folder in setuptools["package-dir"].items():
        link = ROOT.joinpath(*name.split("."))
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


def test_every_shipped_recipe_is_package_data() -> None:
    assert {path.suffix for path in (ROOT / "recipes").iterdir() if path.is_file()} == {".py", ".yaml"}


def test_passes_refuses_to_be_imported_by_another_name() -> None:
    done = subprocess.run([sys.executable, "-c", "import passes"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "ImportError: expected this package to be imported as 'vlmrewrite.passes', got 'passes'" in done.stderr


THIRD_PARTY = '''
from typing import ClassVar

from vlmrewrite.plan import Budget, frozen_pass


@frozen_pass
class Checkerboard:
    """Keeps every second token."""

    name: ClassVar[str] = "checkerboard"
    keep: Budget = 0.5
    layers: tuple[int, ...] = ()


@frozen_pass
class Plain:
    """Has no options."""

    name: ClassVar[str] = "plain"
'''

USER = """
import sys
from pathlib import Path

from vlmrewrite.recipe import Recipe, find_pass, known_passes

head = "name: mine\\npasses:\\n"
Path("mine.yaml").write_text(head + "- checkerboard: {keep: 3, layers: [0, 4]}\\n- plain\\n- stride: {keep: 1}\\n")
assert "vlmrewrite_checkerboard" not in sys.modules
recipe = Recipe.load("sts-half")
assert "vlmrewrite_checkerboard" not in sys.modules
recipe = Recipe.load("mine.yaml")
recipe.to_yaml("copy.yaml")
assert Recipe.load("copy.yaml") == recipe
assert list(known_passes())[-3:] == ["vidcom2", "checkerboard", "plain"], list(known_passes())
from vlmrewrite_checkerboard import Checkerboard
assert find_pass("checkerboard") is Checkerboard
assert recipe.passes[0] == Checkerboard(keep=3, layers=(0, 4))
print(Path("copy.yaml").read_text())
try:
    Path("mine.yaml").write_text(head + "- checkerboard: {keep: 3, layers: [0, x]}\\n")
    Recipe.load("mine.yaml")
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_pass_of_an_installed_package(tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "vlmrewrite_checkerboard.py").write_text(THIRD_PARTY)
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools.build_meta"\n'
        '[project]\nname = "vlmrewrite-checkerboard"\nversion = "1.0"\n'
        f'[project.entry-points."{GROUP}"]\n'
        'checkerboard = "vlmrewrite_checkerboard:Checkerboard"\nplain = "vlmrewrite_checkerboard:Plain"\n'
        '[tool.setuptools]\npy-modules = ["vlmrewrite_checkerboard"]\n'
    )
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run(
        [*pip, "--no-index", "--no-deps", "--no-build-isolation", "--target", str(site), str(project)], check=True
    )
    code = f"import sys; sys.path[:0] = {[str(ROOT), str(site)]!r}\n{USER}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        "name: mine\n"
        "description: ''\n"
        "passes:\n"
        "- checkerboard:\n"
        "    keep: 3\n"
        "    layers: [0, 4]\n"
        "- plain\n"
        "- stride: {keep: 1, at: 0, per: image}\n"
        "backend: auto\n"
        "kernels: auto\n\n"
        "mine.yaml: passes[0].checkerboard.layers[1]: expected a valid integer, got 'x' (str)\n"
    )


def register(folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, name: str, value: str) -> None:
    """Makes it look as if `package` were installed and registered the pass `name` as `value`."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {value}\n")
    monkeypatch.syspath_prepend(str(folder))
    importlib.invalidate_caches()
    assert name in entry_points(group=GROUP).names


NUMBERS = """
from typing import ClassVar

import vlmrewrite as vr
from vlmrewrite.plan import frozen_pass


@frozen_pass
class Numbers:
    name: ClassVar[str] = "numbers"
    budget: vr.Budget
    either: float | int
    other: int | float
    maybe: float | int | None
    several: tuple[float | int, ...]
    named: dict[str, int | float]
    depth: vr.Depth = 0
"""


@pytest.mark.parametrize("one", [1, 1.0])
def test_one_and_all_stay_apart_in_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one: float) -> None:
    """In every option whose type names both int and float: in Python, in a recipe file, and there and back."""
    (tmp_path / "numbers_pass_module.py").write_text(NUMBERS)
    register(tmp_path, monkeypatch, "numeric", "numbers", "numbers_pass_module:Numbers")
    options = dict.fromkeys(("budget", "either", "other", "maybe"), one)
    made = find_pass("numbers")(**options, several=(1, 1.0, one), named={"a": one})
    path = tmp_path / "numbers.yaml"
    Recipe(name="mine", passes=(made,)).to_yaml(path)
    assert all(f"    {name}: {one}\n" in path.read_text() for name in options)
    for found in (made, Recipe.load(path).passes[0]):
        values = [getattr(found, name) for name in options] + [found.several[2], found.named["a"]]
        assert [(type(x), x) for x in values] == [(type(one), one)] * 6
        assert list(map(type, found.several[:2])) == [int, float]
        assert type(found.depth) is int


def test_a_name_that_vlmrewrite_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tmp_path, monkeypatch, "greedy", "sts", "nowhere:STS")
    message = r"^expected one package to have a pass 'sts', got vlmrewrite, greedy; uninstall the others$"
    for ask in (lambda: find_pass("sts"), known_passes):
        with pytest.raises(ValueError, match=message):
            ask()
    with pytest.raises(ValueError, match=r"recipes/sts-half\.yaml: passes\[0\]: expected one package .* greedy"):
        Recipe.load("sts-half")
    assert find_pass("stride") is Stride
    assert Recipe.load("stride-half").passes == (Stride(keep=0.5),)


def test_a_name_that_two_packages_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tmp_path / "a", monkeypatch, "second", "twin", "nowhere:Twin")
    register(tmp_path / "b", monkeypatch, "first", "twin", "nowhere:Twin")
    with pytest.raises(ValueError, match=r"^expected one package to have a pass 'twin', got first, second;"):
        find_pass("twin")


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("nowhere_at_all:Broken", ImportError, r"which cannot be loaded: ModuleNotFoundError: .*nowhere_at_all"),
        ("broken_pass_module:Absent", ImportError, r"which cannot be loaded: AttributeError: .*Absent"),
        ("raising_pass_module:Broken", ImportError, r"which cannot be loaded: ZeroDivisionError"),
        ("broken_pass_module:number", TypeError, r"expected a class made with vlmrewrite\.plan\.frozen_pass, got 3"),
        ("broken_pass_module:Undecorated", TypeError, r"expected a class made with .*, got <class .*Undecorated"),
        ("vlmrewrite.passes:Stride", ValueError, r"expected a class whose `name` is 'broken', got 'stride'"),
    ],
)
def test_a_registration_that_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, error: type[Exception], message: str
) -> None:
    (tmp_path / "broken_pass_module.py").write_text("number = 3\nclass Undecorated:\n    name = 'broken'\n")
    (tmp_path / "raising_pass_module.py").write_text("1 / 0\n")
    register(tmp_path, monkeypatch, "shaky", "broken", value)
    for ask in (lambda: find_pass("broken"), known_passes):
        with pytest.raises(error, match=rf"the package shaky registers the pass 'broken' as '{value}'.*{message}"):
            ask()
    assert find_pass("stride") is Stride
    assert Recipe.load("stride-half").passes == (Stride(keep=0.5),)
    with pytest.raises(ValueError, match=r"unknown pass 'brokn', .*broken.* \(did you mean 'broken'\?\)"):
        find_pass("brokn")


@pytest.mark.parametrize("body", ["import sys; sys.exit(3)", "raise KeyboardInterrupt", "raise RuntimeError('boom')"])
def test_what_another_package_does_at_import_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], body: str
) -> None:
    (tmp_path / "leaving_pass_module.py").write_text(f"{body}\n")
    register(tmp_path, monkeypatch, "leaver", "leave", "leaving_pass_module:Leave")
    with pytest.raises(ImportError, match=r"the package leaver registers the pass 'leave' .* cannot be loaded"):
        find_pass("leave")
    assert Recipe.load("stride-half").passes == (Stride(keep=0.5),)
    app(["passes"], standalone_mode=False)
    out, err = capsys.readouterr()
    assert "stride" in out
    assert err.startswith("warning: the package leaver registers the pass 'leave' as 'leaving_pass_module:Leave'")
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_importing_needs_no_triton_and_no_pass() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import vlmrewrite, vlmrewrite.recipe\n"
        "assert not any(name.startswith('vlmrewrite.passes') for name in sys.modules)\n"
        "import vlmrewrite.passes"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
