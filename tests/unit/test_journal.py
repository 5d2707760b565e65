"""A run on disk: whatever it was cut off in, it goes on behind the last batch that is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmrewrite.evaluate.journal import PROGRESS, SAMPLES, Journal, write_whole

ABOUT = {"data": "abc", "batch": 2, "recipes": {"a": "[A()]"}}


def samples(batch: int) -> list[dict[str, object]]:
    return [{"id": f"q{2 * batch + i}", "output": "ä\n"} for i in range(2)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "a" / "run", ABOUT)
    for batch in range(3):
        journal.add(samples(batch), {"costs": {"a": [1, batch]}})
    return tmp_path / "a" / "run"


def test_it_goes_on_where_it_was(folder: Path) -> None:
    journal = Journal(folder, ABOUT)
    assert journal.lines == [*samples(0), *samples(1), *samples(2)]
    assert [batch["costs"] for batch in journal.batches] == [{"a": [1, n]} for n in range(3)]


@pytest.mark.parametrize("progress", [0, 1, 9])
@pytest.mark.parametrize("lines", [0, 1, 40])
def test_what_is_behind_the_last_whole_batch_is_cut_off(folder: Path, lines: int, progress: int) -> None:
    """The process may end between any two bytes: samples come first, then the line that says that they are whole."""
    ends = [json.loads(line)["bytes"] for line in (folder / PROGRESS).read_text().splitlines()]
    whole = {name: (folder / name).read_bytes() for name in (SAMPLES, PROGRESS)}
    second = whole[PROGRESS].index(b"\n", whole[PROGRESS].index(b"\n") + 1) + 1
    (folder / PROGRESS).write_bytes(whole[PROGRESS][: second + progress])
    (folder / SAMPLES).write_bytes(whole[SAMPLES][: ends[1] + lines])
    journal = Journal(folder, ABOUT)
    assert (len(journal.batches), journal.lines) == (2, [*samples(0), *samples(1)])
    journal.add(samples(2), {"costs": {"a": [1, 2]}})
    assert {name: (folder / name).read_bytes() for name in whole} == whole


def test_another_run_is_refused_and_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"holds a run that differs in batch: .*\(batch: 2, now 3\)"):
        Journal(folder, ABOUT | {"batch": 3})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder, or nothing, got a file"):
        Journal(tmp_path / "file", ABOUT)
    (folder / SAMPLES).write_bytes(before[SAMPLES][:-5])
    with pytest.raises(ValueError, match=r"samples\.jsonl: expected at least \d+ bytes, as progress.jsonl says, got"):
        Journal(folder, ABOUT)
    (folder / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: expected JSON"):
        Journal(folder, ABOUT)


def test_without_a_folder_it_is_in_memory() -> None:
    journal = Journal(None, ABOUT)
    journal.add(samples(0), {})
    assert (journal.lines, journal.batches) == (samples(0), [{}])


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a.json", "new \ud800")
    assert (tmp_path / "a.json").read_text() == "old"
