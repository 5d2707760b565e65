"""What takes long is shown on stderr, and only then; switches of the Hub's client turn it off."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from transformers.utils import logging

import vlmrewrite as vr
from vlmrewrite import progress


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    states = sys.modules["huggingface_hub.utils.tqdm"].progress_bar_states
    before = dict(states)
    monkeypatch.setattr(progress, "PATIENCE", 0.02)
    yield
    states.clear()
    states |= before


def shown(capfd: pytest.CaptureFixture[str]) -> str:
    """What comes of something that takes long."""
    with progress.waiting("long work"):
        time.sleep(0.4)
    out, err = capfd.readouterr()
    assert out == ""
    assert "vlmrewrite-progress" not in [thread.name for thread in threading.enumerate()]
    return err


def test_what_takes_long_is_shown_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    err = shown(capfd)
    assert "long work [00:00]" in err
    assert err.rsplit("\r", 1)[1].strip() == "", "the bar is taken back"


def test_what_is_quick_is_not_shown(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 60.0)
    assert shown(capfd) == ""


def test_an_error_ends_it(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="invalid literal"), progress.waiting("long work"):
        int("x")
    assert "vlmrewrite-progress" not in [thread.name for thread in threading.enumerate()]


def test_switches(capfd: pytest.CaptureFixture[str]) -> None:
    vr.disable_progress_bars()
    assert shown(capfd) == ""
    vr.enable_progress_bars()
    assert "long work" in shown(capfd)
    logging.disable_progress_bar()
    assert shown(capfd) == ""
    logging.enable_progress_bar()
    assert "long work" in shown(capfd)


def test_beside_another_bar_there_is_none(capfd: pytest.CaptureFixture[str]) -> None:
    with progress.quietly():
        assert shown(capfd) == ""
    assert "long work" in shown(capfd)


CAPTURE = """
import vlmrewrite as vr
from vlmrewrite import progress
from vlmrewrite.testing.models import FAMILIES, Row
progress.PATIENCE = progress._BETWEEN = 0.05
tiny = FAMILIES["llava"]()
vr.trace(tiny.model, tiny.inputs([Row(1)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("off", ["0", "1"])
def test_a_capture_that_takes_long_is_shown(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", off)
    done = subprocess.run([sys.executable, "-c", CAPTURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert ("capturing the model" in done.stderr) == (off == "0")
