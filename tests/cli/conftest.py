"""Models for the commands: a folder with a tiny one, and the digits model with questions."""

import json
from pathlib import Path
from typing import Any

import pytest
from saved_llava import saved_llava

from examples.digits.model import load
from examples.digits.scenes import held_out_questions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="session")
def digits() -> Any:
    return load()


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve questions as a user would have them."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i, asked in enumerate(held_out_questions(12)):
        asked.image.save(folder / f"{i}.png")
        row = {"id": f"q{i}", "image": f"{i}.png", "prompt": asked.question, "answer": asked.answer, "kind": asked.kind}
        rows.append(json.dumps(row | {"kind": "<i>&"} if i < 6 else row))
    (folder / "my.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "my.jsonl"


@pytest.fixture
def asked(questions: Path) -> list[dict[str, Any]]:
    """The same as rows, with images wherever one is."""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    return [row | {"image": str(questions.parent / row["image"])} for row in rows]
