"""transformers' Trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vlmrewrite.compat.private import attribute, find


def part_trainer(
    write: Callable[[str], None],
    read: Callable[[str], None],
    loss: Callable[[Any, Any], Tensor],
    parts: Callable[[], dict[str, float]],
) -> Any:
    """A class of Trainers whose checkpoints hold a part of the model, and which has a loss of its own.

    Args:
        write: called with a checkpoint's folder, by one process: writes the part of the model.
        read: called with the same to resume, by all of them.
        loss: of the model, which may be in a wrapper, and a batch: a mean over the batch.
        parts: what to log beside the loss.

    Raises:
        VersionError: this Trainer reads checkpoints in another way.
    """
    base = find("transformers", "Trainer")
    attribute(base, "_load_from_checkpoint", "transformers")

    def save_model(self: Any, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.args.should_save:
            write(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        read(resume_from_checkpoint)

    def compute_loss(self: Any, model: Any, inputs: Any, **_: Any) -> Tensor:
        return loss(model, inputs)

    def log(self: Any, logs: dict[str, float], start_time: float | None = None) -> None:
        base.log(self, logs | parts() if "loss" in logs else logs, start_time)

    own = (save_model, _load_from_checkpoint, compute_loss, log)
    return type("PartTrainer", (base,), {f.__name__: f for f in own} | {"loss_is_scaled_for_ga": False})
