"""`vlmrewrite serve` answers over HTTP as the rewritten model does in this process."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import vlmrewrite as vr
from examples.digits.model import CHECKPOINT, load
from examples.digits.scenes import held_out_questions
from tests.serving.engine import ROOT
from tests.serving.test_vllm_digits import answers

RECIPE, QUESTIONS = "sts-half", 24
TEMPLATE = (
    "{% for m in messages %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image> {% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)
COMMAND = "import sys; sys.modules['torchvision'] = None; from vlmrewrite.cli import app; app()"
"""Without the torchvision of this environment, which cannot read images."""


def asked(port: int, path: str, body: Any = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://localhost:{port}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(answer.read().decode())


def said(port: int, body: Any) -> str:
    return str(json.loads(asked(port, "/v1/chat/completions", body))["choices"][0]["message"]["content"]).strip()


def streamed(port: int, body: Any) -> str:
    """The same, word by word."""
    lines = asked(port, "/v1/chat/completions", body | {"stream": True}).splitlines()
    parts = [json.loads(line.removeprefix("data: ")) for line in lines if line]
    return "".join(part["choices"][0]["delta"].get("content", "") for part in parts).strip()


def question(model: Path, scene: Any) -> dict[str, Any]:
    png = io.BytesIO()
    scene.image.save(png, "PNG")
    image = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": scene.question}]
    return {"model": str(model), "messages": [{"role": "user", "content": parts}], "max_tokens": 4}


def test_a_rewritten_model_over_http(tmp_path: Path) -> None:
    """Also word by word, and when the server was told to forget its models; it serves no other."""
    model, processor = load()
    scenes = held_out_questions(QUESTIONS)
    plain = answers(model, processor, scenes)
    with vr.applied(model, RECIPE):
        expected = answers(model, processor, scenes)
    assert sum(a != b for a, b in zip(plain, expected, strict=True)) > 1, "the recipe changes answers"
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINT, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", COMMAND, "serve", str(folder), "--recipe", RECIPE, "--port", str(port)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment)
    try:
        for _ in range(1200):
            try:
                assert json.loads(asked(port, "/health")) == {"status": "ok"}
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.1)
        asking = [question(folder, scene) for scene in scenes]
        assert [said(port, body) for body in asking] == expected
        assert [streamed(port, body) for body in asking[:4]] == expected[:4]
        with pytest.raises(urllib.error.HTTPError, match="400"):
            said(port, asking[0] | {"model": "another"})
        assert json.loads(asked(port, "/reset", {})) == {"status": "ok"}
        assert [said(port, body) for body in asking] == expected
        server.terminate()
        assert server.wait(60) in (0, -signal.SIGTERM)
        assert "Application shutdown complete" in (tmp_path / "log").read_text()
    finally:
        server.kill()
        server.wait()
