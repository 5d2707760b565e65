"""Models whose layers accelerate has put on two devices: as on one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_as_on_one_device(name):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.second_device", name], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{name}: as on one device" in done.stdout
