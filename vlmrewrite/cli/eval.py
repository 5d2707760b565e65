"""`vlmrewrite eval`: recipes on a user's own samples, beside the unmodified model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmrewrite.cli.app import app
from vlmrewrite.cli.options import (
    Backend,
    Batch,
    Device,
    Dtype,
    Json,
    Kernels,
    Limit,
    LongestAnswer,
    Metric,
    ModelFolder,
    Samples,
    at_least,
    progress_bar,
    recipe_named,
)
from vlmrewrite.cli.terminal import (
    a_line_each,
    as_json,
    check_json,
    folded,
    print_failures,
    print_table,
    warnings_later,
)


@app.command("eval")
def evaluate(
    model: ModelFolder,
    data: Samples,
    recipe: Annotated[
        list[str], typer.Option(help="Recipe, YAML file or folder of trained blocks; may be given several times.")
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for results; a run that was cut off goes on in it.")
    ] = None,
    metric: Metric = "auto",
    batch: Batch = 8,
    max_new_tokens: LongestAnswer = 32,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Of bootstrap intervals.")] = 0,
    backend: Backend = "auto",
    kernels: Kernels = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = None,
) -> None:
    """Ask a model your own questions without and with recipes: accuracy with intervals, and what each recipe saves.

    Differences are paired on the same samples. Without answers in the data, agreement with the unmodified model.
    DIR gets results.json, samples.jsonl and report.html.
    """
    check_json(json)
    at_least("--batch", batch, 1)
    at_least("--max-new-tokens", max_new_tokens, 1)
    at_least("--limit", 1 if limit is None else limit, 1)
    chosen: list[Any] = [name if Path(name).is_dir() else recipe_named(name) for name in recipe]
    from vlmrewrite.recipe import Recipe

    names = [one.name if isinstance(one, Recipe) else Path(one).resolve().name for one in chosen]
    if len({"unmodified", *names}) <= len(names):
        raise ValueError(f"--recipe: expected recipes with names of their own, got {', '.join(names)}")
    from vlmrewrite.evaluate import evaluate as measure
    from vlmrewrite.evaluate import metric_of, read_data

    with a_line_each():
        samples = read_data(data)[:limit]
        metric_of(metric, samples)  # before a model is loaded
    from vlmrewrite.cli import loading
    from vlmrewrite.cli.config import local

    model = local(model, weights=True)
    with loading.joined() as first:
        loaded, processor = loading.with_processor(model, device, dtype)
        with a_line_each(), warnings_later(), progress_bar() as progress:
            task = progress.add_task("samples", total=len(samples))
            done = measure(
                loaded,
                processor,
                samples,
                chosen,
                metric=metric,
                output=output,
                batch=batch,
                max_new_tokens=max_new_tokens,
                backend=backend,
                kernels=kernels,
                seed=seed,
                progress=lambda n, total: progress.update(task, completed=n),
            )
    if not first:
        return
    print_failures(done.failures)
    if as_json(json, done.to_dict()):
        return
    head, *rows = done.cells()
    print(f"{done.rows[0].n} samples, {done.about['metric']}")
    print_table([folded(heading) for heading in head], [[folded(cell) for cell in row] for row in rows])
    for row in done.rows:
        for reason in row.refused:
            print(f"{row.recipe}: does nothing: {reason}")
    if output is not None:
        print(f"page: {output / 'report.html'}")
