"""`vlmrewrite tune`: the recipe that a budget buys on a user's own samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
)
from vlmrewrite.cli.terminal import (
    a_line_each,
    as_json,
    check_json,
    folded,
    print_failures,
    print_table,
    print_wrapped,
    warnings_later,
)

NOTHING_MEETS_IT = 1
"""The exit code where no recipe is what was wished for."""


@app.command()
def tune(
    model: ModelFolder,
    data: Samples,
    budget: Annotated[
        str, typer.Option(metavar="KIND=SHARE", help="Of the unmodified model's: flops=0.3, kv=0.25 or latency=0.5.")
    ],
    max_drop: Annotated[
        str, typer.Option(metavar="SHARE", help="How much lower the mean score may be: 1% or 0.01; any: no bound.")
    ] = "1%",
    output: Annotated[
        Path | None, typer.Option(metavar="RECIPE.yaml", help="The recipe; beside it what was found, .json and .html.")
    ] = None,
    metric: Metric = "auto",
    trials: Annotated[int, typer.Option(help="Recipes that are drawn.")] = 200,
    held_out: Annotated[float, typer.Option(help="Share of the samples that judge what was found.")] = 0.5,
    batch: Batch = 8,
    max_new_tokens: LongestAnswer = 32,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    backend: Backend = "auto",
    kernels: Kernels = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = None,
) -> None:
    """Search the recipe that loses least within a budget, on your own questions, and judge it on held-out ones.

    Controls of equal cost (evenly spaced tokens, random ones) win ties. Exit code 1: nothing meets the wish, and no
    recipe is written.
    """
    check_json(json)
    at_least("--batch", batch, 1)
    at_least("--max-new-tokens", max_new_tokens, 1)
    at_least("--trials", trials, 1)
    at_least("--limit", 1 if limit is None else limit, 1)
    from vlmrewrite.evaluate import read_data
    from vlmrewrite.tune import check_wish, drop_of
    from vlmrewrite.tune import tune as search

    drop = drop_of(max_drop, "--max-drop")
    check_wish(budget, drop, output, metric=metric, held_out=held_out, seed=seed)
    with a_line_each():
        samples = read_data(data)[:limit]
    from vlmrewrite.cli import loading
    from vlmrewrite.cli.config import local

    folder = local(model, weights=True)
    loaded, processor = loading.with_processor(folder, device, dtype)
    with a_line_each(), warnings_later(), progress_bar() as progress:
        task = progress.add_task("prompts", total=None)
        found = search(
            loaded,
            processor,
            samples,
            budget,
            drop,
            metric=metric,
            output=output,
            trials=trials,
            held_out=held_out,
            seed=seed,
            batch=batch,
            max_new_tokens=max_new_tokens,
            backend=backend,
            kernels=kernels,
            progress=lambda stage, n, total: progress.update(task, description=stage, completed=n, total=total),
        )
    print_failures(found.held_out.failures)
    if not as_json(json, found.to_dict()):
        for title, some, cells in (
            ("searched", found.points[0].row.n, found.cells()),
            ("held out", found.held_out.rows[0].n, found.held_out.cells()),
        ):
            print(f"{title}: {some} samples, {found.held_out.about['metric']}")
            print_table([folded(cell) for cell in cells[0]], [[folded(x) for x in row] for row in cells[1:]])
            print()
        for note in found.notes:
            print_wrapped(f"note: {note}", "  ")
        print_wrapped(f"{found.best.name}: {', '.join(map(repr, found.best.passes))}", "  ")
        print_wrapped(found.verdict, "  ")
        if output is not None:
            print(f"page: {output.with_suffix('.html')}")
    if not found.met:
        raise typer.Exit(NOTHING_MEETS_IT)
