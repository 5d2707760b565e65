"""`vlmrewrite map` and `map_rows` on the bundled model: every row once, whatever the run is cut off by."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from examples.digits.model import CHECKPOINT, load
from vlmrewrite.cli import app
from vlmrewrite.evaluate import Answered, Subject
from vlmrewrite.serving import Mapped, map_rows

ROOT = Path(__file__).parents[2]
OPTIONS: dict[str, Any] = {"batch": 3, "max_new_tokens": 2}


@pytest.fixture(scope="module")
def data(questions: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven rows, of which three cannot be answered."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [json.loads(line) for line in questions.read_text().splitlines()[:8]]
    rows = [
        row | {"image": str(questions.parent / row["image"]), "answer": "", "id": f"q{i % 6}"}
        for i, row in enumerate(rows)
    ]
    lines = [json.dumps(row) for row in rows]
    lines[2:2] = ['{"id": "gone", "image": "none.png", "prompt": "what ?"}', "{no json"]
    lines.insert(7, json.dumps(rows[0] | {"prompt": "<image> <image> what ?", "id": 5}))
    (folder / "in.jsonl").write_text("\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:]) + "\n")
    return folder / "in.jsonl"


@pytest.fixture(scope="module")
def whole(digits: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapped:
    """A run of the model as it is that nothing came in between of."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        return map_rows(*digits, data, None, output=tmp_path_factory.mktemp("whole") / "out", **OPTIONS)


@pytest.fixture(autouse=True)
def without_pyarrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "parquet" not in request.node.name:
        monkeypatch.setitem(sys.modules, "pyarrow", None)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_comes_out(whole: Mapped) -> None:
    assert (whole.rows, whole.failed, whole.before) == (11, 3, 0)
    found = lines(whole.answers)
    assert [row["row"] for row in found] == [0, 1, 4, 5, 6, 8, 9, 10]
    assert [row["id"] for row in found] == ["q0", "q1", "q2", "q3", "q4", "q5", "q0", "q1"]
    assert all(isinstance(row["output"], str) and row["output"] for row in found)
    assert whole.errors is not None
    errors = lines(whole.errors)
    assert [row["row"] for row in errors] == [2, 3, 7] and [row["id"] for row in errors] == ["gone", None, "5"]
    for row, said in zip(errors, ("line 3: image: expected an image", "line 5: expected JSON", "got 2"), strict=True):
        assert said in row["error"]


@pytest.mark.parametrize("kept", range(5))
def test_a_run_that_was_cut_off_goes_on(
    digits: Any, data: Path, whole: Mapped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """Behind each of its four batches; where there is a next one, in the middle of what is written of it."""
    folder = tmp_path / "out"
    shutil.copytree(whole.answers.parent, folder)
    (folder / "answers.jsonl").unlink()
    batches = lines(folder / "progress.jsonl")
    ends = [0, *(x["bytes"] for x in batches), batches[-1]["bytes"]]
    os.truncate(folder / "samples.jsonl", ends[kept] + (ends[kept + 1] - ends[kept]) // 2)
    whole_lines = "".join(f"{json.dumps(x)}\n" for x in batches[:kept])
    (folder / "progress.jsonl").write_text(whole_lines + '{"rows": 3, "by' * (kept < 4))
    asked, generate = list[int](), Subject.generate

    def counted(self: Subject, inputs: Any, longest: int) -> Answered:
        asked.append(len(inputs["input_ids"]))
        return generate(self, inputs, longest)

    monkeypatch.setattr(Subject, "generate", counted)
    done = map_rows(*digits, data, None, output=folder, **OPTIONS)
    assert done.before == [0, 3, 6, 9, 11][kept]
    assert sum(asked) == sum(row["row"] >= done.before for row in lines(whole.answers))
    assert contents(folder) == contents(whole.answers.parent)


RUN = """
import sys, time
sys.modules["pyarrow"] = None
from examples.digits.model import load
from vlmrewrite.serving import map_rows
def progress(done, total):
    print(done, flush=True)
    if done >= 6:
        time.sleep(600)
map_rows(*load(), sys.argv[1], None, output=sys.argv[2], batch=3, max_new_tokens=2, progress=progress)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(digits: Any, data: Path, whole: Mapped, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(data), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if int(line) >= 6:
                with pytest.raises(ValueError, match="out: another run is writing to it; expected a folder of its own"):
                    map_rows(*digits, data, None, output=tmp_path / "out", **OPTIONS)
                process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "answers.jsonl").exists()
    done = map_rows(*digits, data, None, output=tmp_path / "out", **OPTIONS)
    assert done.before == 6
    for file in (whole.answers, whole.errors):
        assert file is not None and (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_recipe_on_the_command_line(digits: Any, data: Path, whole: Mapped, tmp_path: Path) -> None:
    (tmp_path / "blind.yaml").write_text("name: blind\npasses:\n- vtw: {at: 0}\n")
    arguments = ["map", CHECKPOINT, "--recipe", tmp_path / "blind.yaml", "--input", data, "--output", tmp_path / "out"]
    arguments += ["--batch", 8, "--max-new-tokens", 2]
    for earlier in ("", ", 11 of them in an earlier run"):
        done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
        assert done.exit_code == 0
        assert done.stdout == f"8 of 11 rows answered{earlier}: {tmp_path / 'out' / 'answers.jsonl'}\n"
        assert "warning: pyarrow is not installed: answers are written as JSONL in place of Parquet\n" in done.stderr
        assert f"warning: 3 rows could not be answered, and why: {tmp_path / 'out' / 'errors.jsonl'}\n" in done.stderr
    assert [row["row"] for row in lines(tmp_path / "out" / "answers.jsonl")] == [0, 1, 4, 5, 6, 8, 9, 10]
    assert lines(tmp_path / "out" / "answers.jsonl") != lines(whole.answers)
    before = contents(tmp_path / "out")
    done = CliRunner().invoke(app, [*map(str, arguments[:-1]), "3"], catch_exceptions=False)
    assert done.exit_code == 2 and "holds a run that differs in max_new_tokens: give another --output" in done.stderr
    assert contents(tmp_path / "out") == before


def test_rows_that_the_model_fails_on(
    digits: Any, data: Path, whole: Mapped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches fail, then rows one by one, one of them for good."""
    generate, turns = Subject.generate, list[int]()

    def failing(self: Subject, inputs: Any, longest: int) -> Answered:
        rows = len(inputs["input_ids"])
        turns.append(rows)
        if rows > 1 or len(turns) == 2:
            raise MemoryError(f"{rows} rows")
        return generate(self, inputs, longest)

    monkeypatch.setattr(Subject, "generate", failing)
    done = map_rows(*digits, data, None, output=tmp_path / "out", **OPTIONS)
    assert lines(done.answers) == lines(whole.answers)[1:]
    assert done.errors is not None
    assert lines(done.errors)[0] == {"row": 0, "id": "q0", "error": "MemoryError: 1 rows"}


def test_a_model_that_fails_on_everything(
    digits: Any, data: Path, whole: Mapped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: Subject, inputs: Any, longest: int) -> Answered:
        raise MemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(Subject, "generate", failing)
        with pytest.raises(RuntimeError, match="the model failed on all of the first 8 rows: MemoryError: full"):
            map_rows(*digits, data, None, output=tmp_path / "out", batch=16, max_new_tokens=2)
        with pytest.raises(RuntimeError, match="the model failed on all of the first 8 rows: MemoryError: full"):
            map_rows(*digits, data, None, output=tmp_path / "few", **OPTIONS)
        first = tmp_path / "first.jsonl"
        first.write_text("\n".join(data.read_text().splitlines()[:3]))
        done = map_rows(*digits, first, None, output=tmp_path / "three", **OPTIONS)
        assert (done.rows, done.failed) == (3, 3) and lines(done.answers) == []  # too few to tell
    for folder, options in (("out", OPTIONS | {"batch": 16}), ("few", OPTIONS)):  # all are asked again
        done = map_rows(*digits, data, None, output=tmp_path / folder, **options)
        assert (done.before, done.failed) == (0, 3)


def test_bad_input(digits: Any, data: Path, tmp_path: Path) -> None:
    model, processor = digits
    out: dict[str, Any] = {"output": tmp_path / "out"}
    for given, kind, said in (
        ({"data": tmp_path / "none.jsonl"}, FileNotFoundError, "expected a file with data"),
        ({"data": CHECKPOINT / "model.safetensors"}, ValueError, r"expected a file that ends in \.jsonl or \.parquet"),
        ({"batch": 0}, ValueError, "batch: expected an integer of at least 1, got 0"),
        ({"recipe": "sts-haf"}, ValueError, "unknown recipe 'sts-haf'"),
        ({"output": data}, ValueError, "expected a folder, or nothing, got a file"),
    ):
        with pytest.raises(kind, match=said):
            map_rows(model, processor, **({"data": data, "recipe": None} | OPTIONS | out | given))
    assert not (tmp_path / "out").exists()
    model.train()
    try:
        with pytest.raises(ValueError, match="expected a .* in eval mode, got one in training"):
            map_rows(model, processor, data, None, **OPTIONS, **out)
    finally:
        model.eval()


def test_ray_that_is_not_there(digits: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ImportError, match=r"^Ray is not installed: pip install 'vlmrewrite\[ray\]', or leave --ray out$"
    ):
        map_rows(*digits, data, None, output=tmp_path / "out", ray="local", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_actors_of_which_one_is_killed(digits: Any, data: Path, whole: Mapped, tmp_path: Path) -> None:
    """Two processes of this machine; the one that answers first is killed then, and takes up again."""
    pytest.importorskip("ray")
    killed = list[int]()

    def progress(done: int, total: int) -> None:
        if done and not killed:
            killed.append(lines(tmp_path / "out" / "progress.jsonl")[0]["process"])
            os.kill(killed[0], signal.SIGKILL)

    options = OPTIONS | {"batch": 1, "ray": "local", "actors": 2, "progress": progress}
    with pytest.raises(ValueError, match="^expected load, a function that loads model and processor in each process"):
        map_rows(*digits, data, None, output=tmp_path / "out", **options)
    done = map_rows(*digits, data, None, output=tmp_path / "out", load=load, **options)
    assert killed and (done.rows, done.failed) == (11, 3)
    assert lines(done.answers) == lines(whole.answers)
    assert sorted(row["row"] for row in lines(tmp_path / "out" / "samples.jsonl")) == [*range(11)]


def test_a_model_that_fails_in_all_processes(digits: Any, data: Path, tmp_path: Path) -> None:
    """Their failures are counted together: each has failed on four rows then, more or less."""
    pytest.importorskip("ray")

    def broken() -> tuple[Any, Any]:
        def failing(self: Subject, inputs: Any, longest: int) -> Answered:
            raise MemoryError("full")

        Subject.generate = failing  # type: ignore[method-assign]  # in that process
        return load()

    options = OPTIONS | {"batch": 1, "ray": "local", "actors": 2}
    with pytest.raises(RuntimeError, match="^the model failed on all of the first 8 rows: MemoryError: full$"):
        map_rows(*digits, data, None, output=tmp_path / "out", load=broken, **options)
    assert not (tmp_path / "out" / "samples.jsonl").exists(), "all of them are asked again"


def test_parquet(digits: Any, data: Path, whole: Mapped, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [json.loads(line) for line in data.read_text().splitlines() if line.startswith('{"id": "q')]
    rows = [{"image": Path(r["image"]).read_bytes(), "prompt": r["prompt"], "id": None} for r in rows]
    rows = [row | {"image": {"bytes": row["image"], "path": None}} for row in rows]
    rows.insert(1, {"image": {"bytes": b"none", "path": None}, "prompt": "what ?", "id": 77})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    done = map_rows(*digits, tmp_path / "in.parquet", None, output=tmp_path / "out", **OPTIONS)
    assert done.answers.name == "answers.parquet" and done.errors is not None
    found = parquet.read_table(done.answers)
    assert found.column_names == ["row", "id", "output"]
    assert found["output"].to_pylist() == [row["output"] for row in lines(whole.answers)]
    assert found["row"].to_pylist() == found["id"].to_pylist() == [0, *range(2, 9)]
    [error] = parquet.read_table(done.errors).to_pylist()
    assert (error["row"], error["id"]) == (
        1,
        "77",
    ) and "in.parquet row 1: image: expected an image file, got 4 bytes" in error["error"]
