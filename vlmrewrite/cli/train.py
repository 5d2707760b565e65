"""`vlmrewrite train`: the blocks of a recipe, on a user's own samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmrewrite.cli.app import app
from vlmrewrite.cli.options import (
    Device,
    Dtype,
    Limit,
    ModelFolder,
    Samples,
    at_least,
    recipe_named,
)
from vlmrewrite.cli.terminal import a_line_each


@app.command()
def train(
    model: ModelFolder,
    recipe: Annotated[str, typer.Option(help="Recipe with blocks, YAML file, or folder of blocks to go on from.")],
    data: Samples,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the blocks, checkpoints and logs.")],
    steps: Annotated[int, typer.Option(help="Steps of the optimizer.")] = 1000,
    batch: Annotated[int, typer.Option(help="Samples of a process at a time.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches of a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-4,
    distil: Annotated[float, typer.Option(help="Weight of the KL to the unmodified model on answers.")] = 0.0,
    bf16: Annotated[bool, typer.Option("--bf16", help="Cast operators to bfloat16.")] = False,
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="Save memory, take more time.")] = False,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; a tenth of all.")] = None,
    log_every: Annotated[int, typer.Option(help="Steps between lines of the log.")] = 10,
    limit: Limit = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that DIR holds.")] = False,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Train the blocks that a recipe adds to a model, on your own questions with answers.

    DIR is what `apply --recipe DIR` and `eval --recipe DIR` take; tensorboard --logdir DIR/logs shows the losses.
    Several GPUs: python -m torch.distributed.run --nproc-per-node 2 -m vlmrewrite train ...
    """
    at_least("--limit", 1 if limit is None else limit, 1)
    chosen: Any = recipe if Path(recipe).is_dir() else recipe_named(recipe)
    from vlmrewrite.evaluate import read_data
    from vlmrewrite.training import check_folder, check_settings, is_first_process

    counts = {"steps": steps, "batch": batch, "accumulate": accumulate, "log_every": log_every}
    check_settings(lr=lr, distil=distil, save_every=save_every, **counts)
    if is_first_process():  # another one may come when this one has begun to write
        check_folder(output, resume=resume)
    with a_line_each():
        samples = read_data(data)[:limit]
    from vlmrewrite.cli import loading
    from vlmrewrite.cli.config import local
    from vlmrewrite.progress import quietly
    from vlmrewrite.training import train as learn

    model = local(model, weights=True)
    loaded, processor = loading.with_processor(model, device, dtype)
    with a_line_each(), quietly():
        done = learn(
            loaded,
            processor,
            samples,
            chosen,
            output=output,
            steps=steps,
            batch=batch,
            accumulate=accumulate,
            lr=lr,
            distil=distil,
            bf16=bf16,
            checkpointing=checkpointing,
            save_every=save_every,
            log_every=log_every,
            resume=resume,
            seed=seed,
            data_name=data.name,
        )
    if not is_first_process():
        return
    if done.log:
        first, last = (done.log[i]["loss"] for i in (0, -1))
        print(f"{done.parameters:,} parameters, {done.steps} steps: loss {first:.4g} to {last:.4g}")
    print(f"blocks: {done.folder}")
