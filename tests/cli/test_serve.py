"""`vlmrewrite serve`: what it refuses; tests/serving/test_server.py asks a server."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers.cli import serve as command
from transformers.cli.serving import model_manager
from transformers.utils import import_utils
from typer.testing import CliRunner

from examples.digits.model import CHECKPOINT
from vlmrewrite import compat
from vlmrewrite.cli import app


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The bundled model with a chat template."""
    shutil.copytree(CHECKPOINT, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{% for m in messages %}<image>{% endfor %}")
    return tmp_path / "model"


def said(*arguments: object) -> str:
    done = CliRunner().invoke(app, ["serve", *map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 2 and not done.stdout
    return done.stderr


def test_what_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = "expected a processor with a chat template, by which a server makes a prompt of messages; its LlavaProcessor"
    assert f"error: {CHECKPOINT}: {bare} has none" in said(CHECKPOINT, "--recipe", "stride-half")
    assert "error: unknown recipe 'stride-haf'" in said(folder, "--recipe", "stride-haf")
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: False)
    needed = (
        "error: transformers' server needs fastapi, uvicorn and openai, and not all of them are installed: pip install"
    )
    assert needed in said(folder, "--recipe", "stride-half")


class Serve:
    """Does with its manager what transformers' server does: when it starts, and when it was told to forget."""

    asked: Callable[[Any], None]

    def __init__(self, force_model: str, *, host: str, port: int) -> None:
        assert (host, port) == ("here", 3)
        manager = model_manager.ModelManager(force_model=force_model)
        manager.shutdown()
        Serve.asked(manager)
        manager.shutdown()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_utils, "is_serve_available", lambda: True)
    monkeypatch.setattr(command, "Serve", Serve)


def test_the_model_is_the_one_that_was_given(stand_in: None) -> None:
    """Each time; another one is refused, and other servers of the process are as before."""
    made: list[Any] = []

    def load() -> Any:
        made.append(SimpleNamespace(name_or_path="mine"))
        return made[-1]

    def asked(manager: Any) -> None:
        assert manager.load_model_and_processor("mine@main") == (made[-1], "its")
        with pytest.raises(ValueError, match="^this server is for 'mine' alone, got a request for 'other@main'$"):
            manager.load_model_and_processor("other@main")

    before, Serve.asked = model_manager.ModelManager, asked
    compat.serve("mine", load, "its", host="here", port=3)
    assert len(made) == 2 and model_manager.ModelManager is before


def test_a_server_that_is_not_there(stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match="^expected a model whose name has no '@' and does not end in .gguf, got 'a@b'$"
    ):
        compat.serve("a@b", dict, None, host="here", port=3)
    monkeypatch.delattr(model_manager.ModelManager, "_load_model")
    with pytest.raises(compat.VersionError, match=r"has no ModelManager\._load_model as vlmrewrite needs it"):
        compat.serve("mine", dict, None, host="here", port=3)
