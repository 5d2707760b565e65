"""`vlmrewrite tune`: the recipe that a budget buys on a user's own samples."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

from vlmrewrite.cli.app import app
from vlmrewrite.cli.options import Device, Dtype, Json, ModelFolder, at_least, progress_bar
from vlmrewrite.cli.terminal import (
    a_line_each,
    as_json,
    check_json,
    folded,
    print_table,
    print_warning,
    print_wrapped,
)

NOTHING_MEETS_IT = 1
"""The exit code where no recipe is what was wished for."""


@app.command()
def tune(
    model: ModelFolder,
    data: Annotated[Path, typer.Option(help="JSONL or Parquet: image, prompt, answer in each row; see docs.")],
    budget: Annotated[
        str, typer.Option(metavar="KIND=SHARE", help="Of the unmodified model's: flops=0.3, kv=0.25 or latency=0.5.")
    ],
    max_drop: Annotated[
        str, typer.Option(metavar="SHARE", help="How much lower the mean score may be: 1% or 0.01; any: no bound.")
    ] = "1%",
    output: Annotated[
        Path | None, typer.Option(metavar="RECIPE.yaml", help="The recipe; beside it what was found, .json and .html.")
    ] = None,
    metric: Annotated[
        str,
        typer.Option(help="exact, contains, choice, vqa, anls, number, f1, rouge, iou, iou50; auto: exact or choice."),
    ] = "auto",
    trials: Annotated[int, typer.Option(help="Recipes that are drawn.")] = 200,
    held_out: Annotated[float, typer.Option(help="Share of the samples that judge what was found.")] = 0.5,
    batch: Annotated[int, typer.Option(help="Prompts at a time.")] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    limit: Annotated[int | None, typer.Option(help="Only so many of the first samples.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    backend: Annotated[Literal["auto", "eager", "inductor"], typer.Option(help="What runs the graph.")] = "auto",
    kernels: Annotated[Literal["auto", "reference", "triton"], typer.Option(help="Which kernels run.")] = "auto",
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
    from vlmrewrite.cli.config import local, read_config

    folder = local(model, weights=True)
    where, (config, _) = loading.device_of(device), read_config(folder)
    processor = loading.read_processor(folder)
    loaded = loading.with_weights(folder, loading.dtype_of(dtype, config, where), where)
    with a_line_each(), progress_bar() as progress, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
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
    for message in dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, UserWarning)):
        print_warning(message)
    for failure in found.held_out.failures:
        print_warning(f"sample {failure['id']!r} failed under {failure['recipe']}: {failure['error']}")
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
