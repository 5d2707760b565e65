"""`vlmrewrite map`: a recipe over a file of pictures and prompts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmrewrite.cli.app import app
from vlmrewrite.cli.options import (
    Backend,
    Batch,
    Device,
    Dtype,
    Kernels,
    LongestAnswer,
    ModelFolder,
    at_least,
    progress_bar,
    recipe_named,
)
from vlmrewrite.cli.terminal import print_warning


@app.command("map")
def map_rows(
    model: ModelFolder,
    recipe: Annotated[str, typer.Option(help="Recipe, YAML file or folder of trained blocks.")],
    data: Annotated[Path, typer.Option("--input", help="JSONL or Parquet: image and prompt in each row; see docs.")],
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the answers; a run that was cut off goes on in it.")
    ],
    batch: Batch = 8,
    max_new_tokens: LongestAnswer = 32,
    backend: Backend = "auto",
    kernels: Kernels = "auto",
    ray: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Processes of this Ray cluster answer; local: of this machine."),
    ] = None,
    actors: Annotated[int, typer.Option(help="How many processes of the cluster.")] = 1,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Answer each row of a file under a recipe: every row once, however often the run is cut off.

    DIR gets answers.parquet, and errors.parquet with the rows that cannot be answered and why; JSONL without pyarrow.
    """
    at_least("--batch", batch, 1)
    at_least("--max-new-tokens", max_new_tokens, 1)
    at_least("--actors", actors, 1)
    chosen: Any = recipe if Path(recipe).is_dir() else recipe_named(recipe)
    from vlmrewrite.evaluate import number_of_rows
    from vlmrewrite.serving import map_rows as answer

    total = number_of_rows(data)
    from vlmrewrite.cli import loading
    from vlmrewrite.cli.config import local

    load = functools.partial(loading.with_processor, local(model, weights=True), device, dtype)
    given = load()
    with progress_bar() as progress:
        task = progress.add_task("rows", total=total)
        done = answer(
            *given,
            data,
            chosen,
            output=output,
            batch=batch,
            max_new_tokens=max_new_tokens,
            backend=backend,
            kernels=kernels,
            ray=ray,
            actors=actors,
            load=load,
            progress=lambda n, total: progress.update(task, completed=n),
        )
    if done.answers.suffix != ".parquet":
        print_warning("pyarrow is not installed: answers are written as JSONL in place of Parquet")
    earlier = f", {done.before} of them in an earlier run" if done.before else ""
    print(f"{done.rows - done.failed} of {done.rows} rows answered{earlier}: {done.answers}")
    if done.errors is not None:
        print_warning(f"{done.failed} rows could not be answered, and why: {done.errors}")
