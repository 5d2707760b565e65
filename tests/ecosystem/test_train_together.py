"""`vr.train` in two processes: the folder is written once, whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import vlmrewrite as vr
from examples.digits.blocks import rows
from examples.digits.model import load

ROOT = Path(__file__).parents[2]

pytest.importorskip("peft")  # of the environment that `make ecosystem` makes: this takes a minute
pytest.importorskip("tensorboard")


def train(folder: str, steps: str) -> None:
    """What each of the processes does."""
    how = {"batch": 4, "lr": 1e-2, "log_every": 1, "save_every": 1, "progress": False}
    done = vr.train(*load(), rows(32, 1), "dpvr", output=folder, steps=int(steps), **how)
    print(f"losses {os.environ['RANK']} {[(line['loss'], line['answers']) for line in done.log]}", flush=True)
    os._exit(0)  # freeing the model beside gloo's threads now and then never ends


def two(folder: Path, steps: int) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    ran = subprocess.run([*command, "tests.ecosystem.test_train_together", str(folder), str(steps)],
                         cwd=ROOT, capture_output=True, text=True, timeout=300)  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_two_processes(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    said = [line.split(" ", 2) for line in two(folder, 2).splitlines() if line.startswith("losses ")]
    assert {rank for _, rank, _ in said} == {"0", "1"} and len({losses for *_, losses in said}) == 1
    told = json.loads((folder / "training.json").read_text())
    assert len(told["log"]) == told["steps"] == 2
    assert "| steps | 2, 8 samples each" in (folder / "README.md").read_text()
    model, _ = load()
    with vr.applied(model, folder):
        assert vr.trainable_blocks(model)


if __name__ == "__main__":
    train(*sys.argv[1:])
