"""Compiling all kernels ahead of time, beside the other tests: it is most of a minute's work for each target."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

FILES = sorted(map(str, Path(__file__).parent.glob("cases_*.py")))


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    output: Path
    errors: Path


COMPILING = pytest.StashKey[dict[str, Running]]()


def start(files: list[str], target: str, folder: Path) -> Running:
    folder.mkdir(parents=True)
    output, errors = folder / "output", folder / "errors"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-m", "vlmrewrite.testing.triton.aot", *files, "--target", target, "--json"]
    with output.open("wb") as out, errors.open("wb") as err:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=err, preexec_fn=lambda: os.nice(10))
    return Running(process, output, errors)
