"""transformers' Trainer."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

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
        parts: what to log beside the loss, of one process; the mean over processes is logged.

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
        base.log(self, logs | _mean(parts()) if "loss" in logs else logs, start_time)

    own = (save_model, _load_from_checkpoint, compute_loss, log)
    return type("PartTrainer", (base,), {f.__name__: f for f in own} | {"loss_is_scaled_for_ga": False})


def _mean(parts: dict[str, float]) -> dict[str, float]:
    """Over all processes; what one of them lacks counts as 0 there."""
    gathered = find("accelerate.utils", "gather_object")([parts])
    names = dict.fromkeys(name for each in gathered for name in each)
    return {name: sum(each.get(name, 0.0) for each in gathered) / len(gathered) for name in names}


_FLAGS = ("training", "gradient_checkpointing", "_gradient_checkpointing_func")


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Behind the block a model is in training or in eval mode, and computes activations again, as before it."""
    before = [(m, {name: vars(m)[name] for name in _FLAGS if name in vars(m)}) for m in model.modules()]
    config: Any = model.config
    cache = {name: x for name, x in vars(config).items() if name == "use_cache"}
    hooks = vars(model).get("_require_grads_hooks")
    try:
        yield
    finally:
        if vars(model).get("_require_grads_hooks") is not hooks:
            model.disable_input_require_grads()  # type: ignore[operator]
            vars(model)["_require_grads_hooks"] = hooks
        vars(config).pop("use_cache", None)  # the Trainer sets it
        vars(config).update(cache)
        for m, had in before:
            for name in _FLAGS:
                vars(m).pop(name, None)
            vars(m).update(had)
