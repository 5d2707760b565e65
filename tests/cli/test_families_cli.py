"""`vlmrewrite families`: the kept table, and what a run does to it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from vlmrewrite.cli.app import app
from vlmrewrite.testing.matrix import run, table
from vlmrewrite.testing.matrix.cells import Cell, Record
from vlmrewrite.testing.models import ZOO

OK, REFUSED = Cell("ok", 1e-6, 1e-5), Cell("refused", reason="no grid")


def record(cell: Cell) -> Record:
    return Record("torch 2.13.0", 1.5, (2, 2), {"prefill": {"Stride": cell}})


def families(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["families", *arguments])


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A table of two families, in which all is well; a run finds that one of them is refused."""
    path = tmp_path / "families.json"
    table.write({"internvl": record(OK), "llava": record(OK)}, path)
    monkeypatch.setattr(table, "KEPT", path)
    monkeypatch.setattr(run, "run", lambda names, **_: ((n, record(REFUSED if n == "llava" else OK)) for n in names))
    return path


def test_the_table_is_printed() -> None:
    done = families()
    assert done.exit_code == 0
    assert done.stdout.splitlines() == list(table.marks(table.read(table.KEPT)))
    data = json.loads(families("--json", "-").stdout)
    assert list(data) == list(table.read(table.KEPT))


def test_one_family(kept: Path) -> None:
    assert families("--family", "llava").stdout.splitlines() == list(table.details("llava", record(OK)))
    assert list(json.loads(families("--family", "llava", "--json", "-").stdout)) == ["llava"]


def test_a_run_keeps_what_it_finds_and_leaves_the_others(kept: Path) -> None:
    done = families("--run", "--family", "llava", "--family", "vipllava")
    assert done.exit_code == 0
    assert "1 of 2: llava: 1 refused" in done.stderr
    assert table.read(kept) == {"internvl": record(OK), "llava": record(REFUSED), "vipllava": record(OK)}


def test_a_check_keeps_nothing_and_fails_where_it_is_worse(kept: Path) -> None:
    before = kept.read_text()
    done = families("--check", "--family", "llava", "--family", "internvl")
    assert done.exit_code == 2
    assert "worse: llava: prefill, Stride: ok (1e-06 of 1e-05) -> refused: no grid\n" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: 1 cells are worse than in the kept table")
    assert families("--check", "--family", "internvl").exit_code == 0
    assert kept.read_text() == before


def test_a_check_of_a_fifth(kept: Path) -> None:
    done = families("--check", "--fifth", "1")
    lines = done.stdout.partition("\n\n")[0].splitlines()
    measured = [line.split()[0] for line in lines[1:]]
    assert measured == sorted(ZOO)[1::5]
    assert done.exit_code == 2  # the table has two families only


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "--check"], "expected --run or --check, got both"),
        (["--fifth", "1"], "expected --run or --check with --fifth"),
        (["--jobs", "2"], "expected --run or --check with --jobs"),
        (["--run", "--fifth", "5"], "--fifth: expected 0 to 4, got 5"),
        (["--run", "--fifth", "1", "--family", "llava"], "expected --family or --fifth, got both"),
        (["--check", "--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (["--check", "--timeout", "0"], "--timeout: expected a number of seconds above 0, got 0"),
        (["--family", "llavva"], "--family: the table has no family 'llavva', expected one of"),
        (["--run", "--family", "llavva"], "--family: there is no tiny model of 'llavva', expected one of"),
    ],
)
def test_what_is_refused(kept: Path, arguments: list[str], message: str) -> None:
    before = kept.read_text()
    done = families(*arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {message}")
    assert kept.read_text() == before
