"""Where Inductor keeps what it compiled."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vlmrewrite.compat.stored import keep_compiled

NAME = "TORCHINDUCTOR_CACHE_DIR"


@pytest.fixture
def unset(monkeypatch, tmp_path):
    """No folder is named."""
    monkeypatch.setenv(NAME, "")  # put back behind the test
    del os.environ[NAME]
    monkeypatch.delenv("VLMREWRITE_CACHE", raising=False)
    return tmp_path


def test_where_none_is_named_nothing_is_set(unset):
    keep_compiled()
    assert NAME not in os.environ


def test_a_folder_can_be_named(unset, monkeypatch):
    monkeypatch.setenv("VLMREWRITE_CACHE", str(unset / "mine"))
    keep_compiled()
    assert os.environ[NAME] == str(unset / "mine" / f"torch-{torch.__version__}")
    assert Path(os.environ[NAME]).stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("VLMREWRITE_CACHE", str(unset / "another"))
    keep_compiled()
    assert Path(os.environ[NAME]).parent == unset / "mine"  # what is set stays


def test_a_folder_that_others_write_to_is_not_used(unset, monkeypatch, caplog):
    folder = unset / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("VLMREWRITE_CACHE", str(folder))
    keep_compiled()
    assert NAME not in os.environ
    assert f"others may write to {folder}; expected mode 0o700, got 0o777" in caplog.text


def test_a_folder_of_another_user_is_not_used(unset, monkeypatch, caplog):
    monkeypatch.setenv("VLMREWRITE_CACHE", str(unset / "mine"))
    monkeypatch.setattr(os, "getuid", lambda: Path.home().stat().st_uid + 1)
    keep_compiled()
    assert NAME not in os.environ
    assert "belongs to user" in caplog.text


def test_a_folder_that_cannot_be_made_is_not_used(unset, monkeypatch, caplog):
    (unset / "file").write_text("")
    monkeypatch.setenv("VLMREWRITE_CACHE", str(unset / "file"))
    keep_compiled()
    assert NAME not in os.environ
    assert "is kept where PyTorch puts it" in caplog.text
