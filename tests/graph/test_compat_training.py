"""A Trainer whose checkpoints hold a part of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

from vlmrewrite.compat import VersionError, part_trainer

pytest.importorskip("accelerate")


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.by = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by


def run(folder: Path, model: Line, told: list[str], **how: str) -> list[dict[str, float]]:
    made = part_trainer(
        lambda path: (Path(path).mkdir(exist_ok=True, parents=True), torch.save(model.by, Path(path, "by.pt")))[1],
        lambda path: (told.append(Path(path).name), model.load_state_dict({"by": torch.load(Path(path, "by.pt"))}))[0],
        lambda wrapped, inputs: (wrapped(inputs["x"]) - 1).square().mean(),
        lambda: {"own": 7.0},
    )
    plain = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    steps = {"max_steps": 4, "save_steps": 2, "logging_steps": 2, "learning_rate": 0.1}
    arguments = TrainingArguments(str(folder), **plain, **steps, remove_unused_columns=False)
    trainer = made(model, arguments, train_dataset=[{"x": torch.ones(1)}] * 8)
    trainer.train(**how)
    return [line for line in trainer.state.log_history if "loss" in line]


def test_its_checkpoints_are_what_was_written_and_read(tmp_path: Path) -> None:
    model, told = Line(), list[str]()
    log = run(tmp_path, model, told)
    assert [line["own"] for line in log] == [7.0, 7.0] and log[1]["loss"] < log[0]["loss"]
    assert not told and not list(tmp_path.rglob("*.safetensors"))
    other = Line()
    again = run(tmp_path, other, told, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert told == ["checkpoint-2"] and again == log
    assert torch.equal(other.by, model.by)


def test_a_trainer_that_reads_in_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(Trainer, "_load_from_checkpoint")
    with pytest.raises(VersionError, match="has no Trainer._load_from_checkpoint as vlmrewrite needs it"):
        part_trainer(print, print, print, dict)
