"""Two processes, as torchrun and accelerate start them, share an evaluation: what they find is what one finds alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vlmrewrite as vr
from examples.digits.model import CHECKPOINT
from vlmrewrite.evaluate.together import Together

ROOT = Path(__file__).parents[2]

SCRIPT = """
import sys
import pytest
from transformers import AutoModelForImageTextToText
import vlmrewrite as vr
from vlmrewrite.cli import app, loading
from vlmrewrite.evaluate.together import Together

def fails(rank):
    if both.rank == rank:
        raise ValueError(f"no {rank}")
    return both.rank

with loading.joined() as first:
    both = Together()
    assert (both.count, first) == (2, both.rank == 0)
    assert both.each(lambda: both.rank) == [0, 1]
    told = "^no 0$" if first else "^process 0: ValueError: no 0$"
    with pytest.raises(ValueError if first else RuntimeError, match=told):
        both.each(lambda: fails(0))
    with pytest.raises(RuntimeError if first else ValueError, match="no 1"):
        both.each(lambda: fails(1))
    both.same({"data": 3})
    with pytest.raises(ValueError, match="^expected the same in each of the 2 processes, got data: 0, 1$"):
        both.same({"data": both.rank, "batch": 3})
    sharded = AutoModelForImageTextToText.from_pretrained(sys.argv[2], tp_plan="auto")
    before = dict(vars(sharded))
    with pytest.raises(ValueError, match="cannot be rewritten: .* is sharded over processes"):
        vr.apply(sharded, "stride-half")
    assert vars(sharded) == before
    app(sys.argv[1:])
"""


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.filterwarnings("ignore:12 samples. intervals are wide")
def test_what_two_processes_find_is_what_one_finds(launcher: str, digits: Any, questions: Path, tmp_path: Path) -> None:
    """They go on with a run that one process has begun."""
    vr.evaluate(*digits, questions, "stride-half", output=tmp_path / "one", batch=2, max_new_tokens=4)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for name in ("results.json", "report.html"):
        (tmp_path / "two" / name).unlink()
    begun, *_ = (tmp_path / "one" / "progress.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "two" / "progress.jsonl").write_text(begun)
    (tmp_path / "script.py").write_text(SCRIPT)
    if launcher == "accelerate":
        pytest.importorskip("accelerate")
    command = [sys.executable, "-W", "ignore", "-m", *LAUNCHERS[launcher]]
    command += [
        tmp_path / "script.py",
        "eval",
        CHECKPOINT,
        "--data",
        questions,
        "--recipe",
        "stride-half",
        "--batch",
        "2",
    ]
    command += ["--max-new-tokens", "4", "--output", tmp_path / "two", "--json", tmp_path / "said.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("12 samples") == 1
    assert done.stderr.count("intervals are wide") == 1
    one, two = ((tmp_path / name / "samples.jsonl").read_text() for name in ("one", "two"))
    assert two == one
    first, other = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert json.loads((tmp_path / "said.json").read_text()) == other
    for a, b in zip(first["rows"], other["rows"], strict=True):
        timed = {key for key in a if key.startswith(("prefill", "decode"))}
        assert {k: x for k, x in a.items() if k not in timed} == {k: x for k, x in b.items() if k not in timed}


def test_one_process_alone_is_no_group() -> None:
    alone = Together()
    assert (alone.rank, alone.count, alone.each(lambda: 3)) == (0, 1, [3])
    alone.same({"data": object()})
