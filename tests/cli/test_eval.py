"""`vlmrewrite eval` and `vr.evaluate` on the bundled model: tables, files, runs that were cut off, and bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import vlmrewrite as vr
from examples.digits.model import CHECKPOINT, load
from examples.digits.scenes import held_out_questions
from vlmrewrite.cli import app
from vlmrewrite.evaluate import Evaluation
from vlmrewrite.passes import Stride

ROOT = Path(__file__).parents[2]
OPTIONS = {"batch": 4, "max_new_tokens": 4}
RECIPES = ["stride-half", vr.Recipe(name="eighth", passes=(Stride(keep=0.125),))]

pytestmark = pytest.mark.filterwarnings("ignore:.* samples. intervals are wide")


@pytest.fixture(scope="module")
def whole(digits: Any, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    """A run that nothing came in between of."""
    folder = tmp_path_factory.mktemp("run") / "out"
    with pytest.warns(UserWarning, match="^12 samples: intervals are wide below 30$"):
        return vr.evaluate(*digits, questions, RECIPES, output=folder, **OPTIONS), folder


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = ("prefill", "decode", "prefill_seconds", "decode_seconds")
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]


def refused(*arguments: object) -> list[str]:
    """The lines on stderr, without their ``error:``."""
    done = CliRunner().invoke(app, ["eval", *map(str, arguments)], catch_exceptions=False)
    assert (done.exit_code, done.stdout) == (2, "")
    found = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return [line.removeprefix("error: ") for line in found]


@pytest.mark.slow
def test_the_rows(digits: Any, asked: list[dict[str, Any]], whole: tuple[Evaluation, Path]) -> None:
    model, processor = digits
    done, folder = whole
    found = json.loads((folder / "results.json").read_text())
    assert found == done.to_dict()
    rows, samples = found["rows"], lines(folder / "samples.jsonl")
    assert [row["recipe"] for row in rows] == ["unmodified", "stride-half", "eighth"]
    assert [row["n"] for row in rows] == [12] * 3
    plain = [rows[0][key] for key in ("flops", "kv", "prefill", "decode", "difference", "changed")]
    assert plain == [1, 1, 1, 1, 0, 0]
    assert [(line["id"], line["recipe"]) for line in samples[:4]] == [
        ("q0", "unmodified"), ("q0", "stride-half"), ("q0", "eighth"), ("q1", "unmodified")
    ]  # fmt: skip
    records = held_out_questions(4)
    images, texts = [[r.image] for r in records], [f"<image> {r.question}" for r in records]
    inputs = processor(images=images, text=texts, return_tensors="pt", padding=True)
    with vr.applied(model, RECIPES[1]):
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        totals = vr.report(model).totals
    assert rows[2]["flops"] == pytest.approx(totals["after"]["flops"] / totals["before"]["flops"])
    assert rows[2]["kv"] == pytest.approx(totals["after"]["kv_bytes"] / totals["before"]["kv_bytes"])
    outputs = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [line["output"] for line in samples[2:12:3]] == outputs
    for i, row in enumerate(rows):
        own = samples[i::3]
        right = [float(line["output"] == r["answer"]) for line, r in zip(own, asked, strict=True)]
        assert [line["score"] for line in own] == right
        assert row["accuracy"] == pytest.approx(sum(right) / 12)
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
    changed = [a["score"] != b["score"] for a, b in zip(samples[::3], samples[2::3], strict=True)]
    assert rows[2]["changed"] == sum(changed) > 0
    assert rows[2]["difference"] == pytest.approx(rows[2]["accuracy"] - rows[0]["accuracy"])
    assert rows[2]["flops"] < rows[1]["flops"] < 0.6 and rows[2]["peak_bytes"] < rows[0]["peak_bytes"]
    assert set(rows[0]["kinds"]) == {"<i>&", *(r["kind"] for r in asked[6:])}
    assert rows[0]["kinds"]["<i>&"]["n"] == 6
    with pytest.raises(ValueError, match="is not rewritten"):
        vr.report(model)


def test_the_page(whole: tuple[Evaluation, Path]) -> None:
    done, folder = whole
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "<link" not in page and not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "&lt;i&gt;&amp;" in page and "<i>&" not in page
    assert "prefers-color-scheme: dark" in page
    assert page.count("<circle") == 3
    cards = page.count('class="card"')
    assert cards == sum(row.changed for row in done.rows)
    assert page.count("18 of 144 tokens") == done.rows[2].changed


KILLED = """
import os, signal
from vlmrewrite.evaluate import journal
import examples.digits.model as digits
import vlmrewrite as vr
from vlmrewrite.passes import Stride

append = journal._append

def half(path, data):
    if path.name != "samples.jsonl" or not path.exists():
        return append(path, data)
    append(path, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)

journal._append = half
recipes = ["stride-half", vr.Recipe(name="eighth", passes=(Stride(keep=0.125),))]
vr.evaluate(*digits.load(), {data!r}, recipes, output={output!r}, batch=4, max_new_tokens=4)
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(
    digits: Any, questions: Path, whole: tuple[Evaluation, Path], tmp_path: Path
) -> None:
    folder, (done, _) = tmp_path / "out", whole
    code = KILLED.replace("{data!r}", repr(str(questions))).replace("{output!r}", repr(str(folder)))
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -9, ended.stderr
    assert {path.name for path in folder.iterdir()} == {".lock", "run.json", "samples.jsonl", "progress.jsonl"}
    first = (folder / "progress.jsonl").read_text()
    assert first.count("\n") == 1 and not (folder / "samples.jsonl").read_text().endswith("\n")
    with (folder / "progress.jsonl").open("a") as file:
        file.write('{"costs": {"st')
    seen = []
    again = vr.evaluate(
        *digits, questions, RECIPES, output=folder, progress=lambda n, total: seen.append((n, total)), **OPTIONS
    )
    assert seen == [(0, 12), (4, 12), (8, 12), (12, 12)]
    assert (folder / "progress.jsonl").read_text().startswith(first)
    assert without_times(again.to_dict()["rows"]) == without_times(done.to_dict()["rows"])
    assert [(x["id"], x["recipe"], x["output"]) for x in lines(folder / "samples.jsonl")] == [
        (x["id"], x["recipe"], x["output"]) for x in done.samples
    ]
    assert (folder / "report.html").exists()


def test_another_run_is_not_mixed_in(
    digits: Any, questions: Path, asked: list[dict[str, Any]], whole: tuple[Evaluation, Path], tmp_path: Path
) -> None:
    _, folder = whole
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for arguments, options, key in (
        ((asked[:8], RECIPES), {}, "data, samples"),
        ((questions, RECIPES[:1]), {}, "recipes"),
        ((questions, RECIPES), {"batch": 3}, "batch"),
        ((questions, RECIPES), {"metric": "contains"}, "metric"),
    ):
        with pytest.raises(ValueError, match=rf"holds a run that differs in {key}: give another"):
            vr.evaluate(*digits, *arguments, output=folder, **OPTIONS | options)
    other = load()
    with torch.no_grad():
        next(other[0].parameters()).add_(1)
    with pytest.raises(ValueError, match="holds a run that differs in model"):
        vr.evaluate(*other, questions, RECIPES, output=folder, **OPTIONS)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "samples.jsonl").write_text("mine")
    with pytest.raises(ValueError, match=r"expected an empty folder or one with run.json, got one with samples.jsonl"):
        vr.evaluate(*digits, questions, RECIPES, output=tmp_path, **OPTIONS)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_the_command(questions: Path, whole: tuple[Evaluation, Path], tmp_path: Path) -> None:
    options = [
        "--data",
        questions,
        "--recipe",
        "stride-half",
        "--batch",
        4,
        "--max-new-tokens",
        4,
        "--output",
        tmp_path / "o",
    ]
    done = CliRunner().invoke(app, ["eval", str(CHECKPOINT), *map(str, options)], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert "warning: 12 samples: intervals are wide below 30" in done.stderr.splitlines()
    assert "12 samples, exact" in done.stdout and "stride-half" in done.stdout
    rows = json.loads((tmp_path / "o" / "results.json").read_text())["rows"]
    assert without_times(rows) == without_times(whole[0].to_dict()["rows"][:2])


def test_bad_input_of_the_command(questions: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    image = str(questions.parent / "0.png")
    bad.write_text(
        "\n".join(
            json.dumps(row)
            for row in (
                {"image": "no.png", "prompt": "?", "answer": "a"},
                {"image": image, "prompt": "?", "answer": ""},
                {"image": image, "prompt": "?", "choices": ["a", "b"], "answer": "c d"},
                {"prompt": "?", "answer": "a"},
            )
        )
    )
    found = refused(CHECKPOINT, "--data", bad, "--recipe", "stride-half", "--output", tmp_path / "o")
    assert [line.partition(": ")[0] for line in found] == [f"{bad} line {i}" for i in (1, 2, 3, 4)]
    some = ["--data", questions, "--output", tmp_path / "o"]
    for arguments, message in (
        ([CHECKPOINT, *some, "--recipe", "stride-haf"], "unknown recipe 'stride-haf'"),
        ([CHECKPOINT, *some, "--recipe", "stride-half", "--metric", "exat"], "unknown metric 'exat', expected one of"),
        ([CHECKPOINT, *some, "--recipe", "stride-half", "--batch", 0], "--batch: expected at least 1, got 0"),
        (
            [CHECKPOINT, *some, *["--recipe", "stride-half"] * 2],
            "recipes with names of their own, got stride-half, str",
        ),
        (["nowhere", *some, "--recipe", "stride-half"], "expected a model folder or a config JSON file, got 'nowhere'"),
        (
            [CHECKPOINT, "--data", "no.jsonl", "--recipe", "stride-half"],
            "expected a file with data, got 'no.jsonl'",
        ),
    ):
        [line] = refused(*arguments)
        assert message in line
    assert not (tmp_path / "o").exists()
