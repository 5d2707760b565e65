"""A training run: transformers' Trainer on the blocks of a recipe."""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from vlmrewrite.api import applied, applied_recipe, processor_set
from vlmrewrite.checkpoint import load_blocks, save_blocks
from vlmrewrite.compat import modes_kept, part_trainer
from vlmrewrite.evaluate import Sample, end_tokens, fingerprint, identity_of, numbers_of, read_data, refuse_chats
from vlmrewrite.hf import base_model_of, refuse_smaller
from vlmrewrite.training.batches import answered, refuse_damaged
from vlmrewrite.training.blocks import other_learners, trainable_blocks
from vlmrewrite.training.folder import (
    CHECKPOINTS,
    LOGS,
    check_folder,
    latest_checkpoint,
    refuse_other_run,
    state_of,
    write_about,
    write_blocks,
)
from vlmrewrite.training.objective import Objective
from vlmrewrite.training.settings import check_settings

_NEEDED = ("accelerate", "tensorboard")

_NO_PARTS = ("loss", "grad_norm", "learning_rate", "epoch", "step")


@dataclass(frozen=True)
class Training:
    """What a run did.

    Attributes:
        folder: that ``vlmrewrite.apply`` takes.
        steps: of the optimizer.
        parameters: that were trained.
        log: what was logged, in order: ``step``, ``loss`` and its parts, ``learning_rate``, ``grad_norm``.
    """

    folder: Path
    steps: int
    parameters: int
    log: tuple[dict[str, Any], ...]


def train(
    model: Any,
    processor: Any,
    data: Any,
    recipe: Any,
    *,
    output: str | os.PathLike[str],
    steps: int = 1000,
    batch: int = 8,
    accumulate: int = 1,
    lr: float = 1e-4,
    distil: float = 0.0,
    bf16: bool = False,
    checkpointing: bool = False,
    save_every: int | None = None,
    log_every: int = 10,
    resume: bool = False,
    seed: int = 0,
    progress: bool = True,
    data_name: str | None = None,
) -> Training:
    """Train the blocks that a recipe adds to a model, and nothing else of it, by transformers' Trainer.

    The loss is the model's on the tokens of answers, with a weight the distillation to the unmodified model, and what
    the recipe's passes say that they are trained by (:data:`vlmrewrite.training.TRAINED_BY`). Several processes:
    start the script by ``python -m torch.distributed.run``. Learning rates go up over the first twentieth of the steps
    and down to 0 as a cosine. The process's random number generators are seeded.

    Args:
        model: an unmodified model; it is given back unmodified.
        processor: its, with a tokenizer and an image processor.
        data: as for :func:`vlmrewrite.evaluate`, with answers; of several, the first is learnt.
        recipe: as for :func:`vlmrewrite.apply`, with blocks; a folder of trained blocks goes on from these.
        output: folder that gets ``vlmrewrite.json`` and ``vlmrewrite_blocks.safetensors`` (``vlmrewrite.apply(model,
            output)`` takes it), a card, ``training.json``, ``checkpoints`` and ``logs`` for TensorBoard.
        steps: of the optimizer.
        batch: samples of a process at a time.
        accumulate: batches of a step.
        lr: the highest learning rate, of AdamW without weight decay.
        distil: weight of the KL to the unmodified model on the tokens of answers.
        bf16: cast operators to bfloat16 (autocast).
        checkpointing: compute activations again in the backward pass, to save memory.
        save_every: steps between two checkpoints, of which the last two are kept; None: a tenth of all.
        log_every: steps between two lines of the log.
        resume: go on with the run in ``output``, from its last checkpoint; one that is done is not trained further.
        seed: of the blocks' first numbers, the order of samples, and whatever is drawn.
        progress: show transformers' bar; without it nothing is printed.
        data_name: what the card calls the data; None: the name of its file, if ``data`` is one.

    Raises:
        ValueError: data, recipe, model, folder or a setting cannot be used; nothing is written.
        OSError: an image cannot be decoded; nothing is written.
        RuntimeError: the loss, gradients or blocks are no longer finite; of such blocks nothing is written.
        ImportError: accelerate or tensorboard is not installed.
    """
    if lacking := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
        raise ImportError(f"training needs {' and '.join(lacking)}: pip install 'vlmrewrite[train]'")
    counts = {"steps": steps, "batch": batch, "accumulate": accumulate, "log_every": log_every}
    check_settings(lr=lr, distil=distil, save_every=save_every, **counts)
    samples = read_data(data)
    if not samples[0].answers:
        raise ValueError(f"expected an 'answer' in each row to learn, got none in {len(samples)} rows")
    refuse_chats(processor, samples)
    refuse_damaged(samples)
    base, folder = base_model_of(model), Path(output)
    weights = identity_of(base)
    transformers.set_seed(seed)
    with modes_kept(base), processor_set(), applied(base, recipe, backend="eager", strict=True):
        blocks = trainable_blocks(base)
        processor = applied_recipe(base).processor(processor)
        first = answered(processor, samples[:1], end_tokens(base))  # fails before anything is written
        if applied_recipe(base).sets_processor:
            refuse_smaller(base, {name: x.to(base.device) for name, x in first.items()})
        if others := other_learners(base):
            raise ValueError(
                f"{others[0]} and {len(others) - 1} more parameters ask for a gradient: blocks alone are trained here;"
                " freeze the others, or write a loop of your own"
            )
        if low := sorted({str(p.dtype) for p in blocks.parameters() if p.dtype.itemsize < 4}):
            warnings.warn(
                f"blocks are {', '.join(low)}: AdamW loses steps that are small beside their numbers there; load the"
                " model in float32, and train with bf16 (--dtype float32 --bf16)",
                stacklevel=2,
            )
        objective = Objective(base, distil=distil, seed=seed, bf16=bf16)
        settings = {"batch": batch, "accumulate": accumulate, "lr": lr, "distil": distil, "bf16": bf16}
        about = {
            "recipe": applied_recipe(base).to_data(),
            "base_model": _named(base.name_or_path),
            "weights": weights,
            "start": numbers_of(blocks),
            "data": fingerprint(samples),
            "samples": len(samples),
            **settings,
            "steps": steps,
            "seed": seed,
            "losses": objective.losses(),
        }
        arguments = transformers.TrainingArguments(
            str(folder / CHECKPOINTS),
            max_steps=steps,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            weight_decay=0.0,
            activation_checkpointing=checkpointing,
            save_steps=save_every or math.ceil(steps / 10),
            save_total_limit=2,
            logging_steps=min(log_every, steps),
            logging_nan_inf_filter=False,
            seed=seed,
            report_to=[],
            remove_unused_columns=False,
            dataloader_pin_memory=base.device.type == "cuda",
            use_cpu=base.device.type == "cpu",
            disable_tqdm=not progress,
        )
        _check_processes(arguments, bf16=bf16)
        about["processes"] = arguments.world_size
        if arguments.should_save:
            check_folder(folder, resume=resume)
            if resume:
                refuse_other_run(folder, about)
        last = latest_checkpoint(folder) if resume else None
        made, log = (0, []) if last is None else state_of(last)
        if last is not None and made >= steps:
            load_blocks(base, last)
        else:
            trainer = _trainer(base, processor, samples, objective, arguments, folder)
            if arguments.should_save:
                write_about(folder, about, [], 0)
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
            log = trainer.state.log_history
        log = [dict(sorted(line.items())) for line in log if "loss" in line]  # as checkpoints have them
        count = sum(p.numel() for p in blocks.parameters())
        if arguments.should_save:
            named = data_name or (Path(data).name if isinstance(data, str | os.PathLike) else None)
            write_about(folder, about, log, steps)
            write_blocks(folder, base, _facts(about, log, count, named, arguments))
    return Training(folder, steps, count, tuple(log))


def _named(path: str) -> str:
    """A model's name on the Hub, or that of its folder, without where this lies."""
    return Path(path).name if Path(path).exists() else path


def _check_processes(arguments: Any, *, bf16: bool) -> None:
    """Raise ValueError where what started the process asks for what is not done here."""
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs are seen by one process: start one for each by python -m torch.distributed.run,"
            " or show it one by CUDA_VISIBLE_DEVICES"
        )
    if arguments.mixed_precision != "no" and not (bf16 and arguments.mixed_precision == "bf16"):
        raise ValueError(
            f"accelerate is told to use mixed precision {arguments.mixed_precision!r} (its configuration, or"
            " --mixed_precision): expected 'no' there; --bf16 (bf16=True) casts operators to bfloat16"
        )


def _trainer(
    model: Any, processor: Any, samples: list[Sample], objective: Objective, arguments: Any, folder: Path
) -> Any:
    from transformers.integrations.integration_utils import TensorBoardCallback  # not everywhere

    ends, like = end_tokens(model), model.dtype

    def collate(some: list[Sample]) -> dict[str, Any]:
        given = answered(processor, some, ends)
        return {name: x.to(like) if x.is_floating_point() else x for name, x in given.items()}

    def read(checkpoint: str) -> None:
        load_blocks(model, checkpoint)

    learning = list(trainable_blocks(model).parameters())

    def finite(what: str, found: Iterable[Tensor | None]) -> None:
        if not all(bool(x.isfinite().all()) for x in found if x is not None):
            raise RuntimeError(
                f"step {made.state.global_step + 1}: {what} not finite, at a learning rate of"
                f" {made.lr_scheduler.get_last_lr()[0]:.3g}: lower --lr, and give another --output folder"
            )

    def write(checkpoint: str) -> None:
        finite("blocks are", learning)
        save_blocks(model, checkpoint)

    def loss(wrapped: Any, inputs: Any) -> Any:
        found = objective(wrapped, inputs, made.state.global_step)
        finite(f"the loss is {float(found.detach())},", [found])
        return found

    class Gradients(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            finite("gradients are", (p.grad for p in learning))

    try:
        made = part_trainer(write, read, loss, objective.means)(
            model, arguments, data_collator=collate, train_dataset=samples, callbacks=[Gradients()]
        )
    except ValueError as e:
        if getattr(model, "is_quantized", False):
            raise ValueError(
                f"{type(model).__name__} is quantised, and transformers' Trainer takes no such model without adapters:"
                " load its plain weights, or write a loop of your own"
            ) from e
        raise
    made.remove_callback(transformers.PrinterCallback)  # to stdout
    board = TensorBoardCallback()
    board.logging_dir = str(folder / LOGS)
    made.add_callback(board)
    return made


def _facts(
    about: dict[str, Any], log: list[dict[str, Any]], count: int, named: str | None, arguments: Any
) -> dict[str, Any]:
    """Rows of the card's table."""
    parts = [name for name in log[0] if name not in _NO_PARTS]
    losses = ", ".join(f"{name} {log[0][name]:.4g} to {log[-1][name]:.4g}" for name in parts if name in log[-1])
    versions = {"vlmrewrite": importlib.import_module("vlmrewrite").__version__, "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    batch = about["batch"] * about["accumulate"] * arguments.world_size
    return {
        "recipe": f"`{about['recipe']['name']}`",
        "base model": f"`{about['base_model']}`",
        "trained parameters": f"{count:,}",
        "data": f"{f'`{named}`, ' if named else ''}{about['samples']} samples, sha256 `{about['data'][:16]}`",
        "steps": f"{about['steps']}, {batch} samples each, AdamW, learning rate {about['lr']:g}, seed {about['seed']}",
        "losses": losses + (f"; distillation weighs {about['distil']:g}" if about["distil"] else ""),
        "precision": "bf16 autocast" if about["bf16"] else "as the model",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }
