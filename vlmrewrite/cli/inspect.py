"""`vlmrewrite inspect`: a model's layers and what a recipe would do to them, or a measured profile."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import typer

from vlmrewrite.cli.app import app
from vlmrewrite.cli.options import (
    ImageSize,
    ImageTokens,
    Json,
    Model,
    a_question,
    pixels,
    progress_bar,
    recipe_named,
    unset,
)
from vlmrewrite.cli.terminal import as_json, check_json, print_table


@app.command()
def inspect(
    model: Model,
    recipe: Annotated[str | None, typer.Option(help="What to plan: a shipped recipe's name or a YAML file.")] = None,
    text: Annotated[int | None, typer.Option(help="Text tokens in each row of a made-up prompt [64].")] = None,
    images: Annotated[int | None, typer.Option(help="Images in each row [1].")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of the batch [1].")] = None,
    image_tokens: ImageTokens = None,
    image_size: ImageSize = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of weights and K/V [bfloat16; with --profile float32 on a CPU, else the config's]."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure what vision tokens do in each layer, with weights and images.")
    ] = False,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file whose size is taken, or several to profile.")
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Question about all images, or one for each, in their order.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the profile into this file.")] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Where to profile [auto: the GPU if there is one].")
    ] = None,
    json: Json = None,
) -> None:
    """Show a model's layers and what a recipe would do to them, without weights: tokens, FLOPs and K/V bytes.

    With --profile: measure on images, layer by layer, the attention that text pays to them, cosines between hidden
    states before and after, and the change of the next token's distribution (KL) when vision is frozen or hidden there.
    """
    check_json(json)
    made_up = {"text": text, "images": images, "rows": rows, "image_tokens": image_tokens}
    if profile:
        unset({"recipe": recipe, "image_size": image_size} | made_up, "--profile without")
        _profile(model, image or [], prompt or [], plot, device or "auto", dtype or "auto", json)
        return
    unset({"prompt": prompt, "plot": plot, "device": device}, "--profile with")
    if sum(x is not None for x in (image or None, image_tokens, image_size)) > 1:
        raise ValueError("expected one of --image, --image-size and --image-tokens")
    if image and len(image) > 1:
        raise ValueError(f"--image: expected one without --profile, whose size is taken, got {len(image)}")
    picture = None if image_size is None else pixels(image_size)
    chosen = None if recipe is None else recipe_named(recipe)
    dtype = dtype or "bfloat16"
    import torch

    from vlmrewrite.cli import catalogue
    from vlmrewrite.cli.config import config_file, local, read_config, skeleton
    from vlmrewrite.cli.prompt import captured_prompt, made_up_shape
    from vlmrewrite.compiler import rewritten
    from vlmrewrite.report import summary, verdict

    if image:
        from vlmrewrite.cli.loading import read_images

        picture = read_images(image)[0].size
    given, model = model, local(model)
    config, written = read_config(model)
    counts = {name: n for name, n in made_up.items() if n is not None}
    shape, source = made_up_shape(config, written, counts.pop("image_tokens", None), counts, picture, model)
    built = skeleton(config, getattr(torch, dtype), config_file(model))
    program, _ = captured_prompt(built, shape)
    if chosen is not None:
        chosen.check_layers(program.plan.depth)
    planned = program if chosen is None else rewritten(program, chosen.passes)
    count = sum(p.numel() for p in built.parameters())
    found = summary(planned, () if chosen is None else chosen.passes)
    about = {"model": str(given), "class": type(built).__name__, "parameters": count, "dtype": dtype}
    about |= {"prompt": dataclasses.asdict(shape), "image_tokens_from": source}
    about |= {"recipe": None if chosen is None else catalogue.recipe_data(chosen)}
    if as_json(json, about | found):
        return
    print(f"{type(built).__name__}, {count:,} parameters; {shape.image_tokens} tokens an image ({source})\n\n{program}")
    if chosen is None:
        return
    print(f"\nrecipe {chosen.name}")
    for p in found["passes"]:
        print(f"  {p['configuration']}: {verdict(p)}")
    print(f"\n{dataclasses.replace(planned, outcomes=())}\n")  # the passes are told above
    table = []
    dispatches, every = "variants" in found, [each["totals"] for each in found.get("variants", [found])]
    for label, key, unit in (("tokens a layer", "tokens", 1), ("GFLOP", "flops", 1e9), ("K/V MiB", "kv_bytes", 2**20)):
        row = [label, f"{found['totals']['before'][key] / unit:.4g}"]
        for totals in every:
            after, ratio = totals["after"][key] / unit, totals["before"][key] / totals["after"][key]
            row += [f"{after:.4g}, ÷ {ratio:.2f}"] if dispatches else [f"{after:.4g}", f"÷ {ratio:.2f}"]
        table.append(row)
    headings = [f"variant {i}" for i in range(len(every))] if dispatches else [chosen.name, "ratio"]
    print_table(["prefill", "unmodified", *headings], table)
    if chosen.sets_processor:
        print("note: smaller pictures are shown by --image-size and --image-tokens; their costs, by bench and eval")
    for note in found["notes"]:
        print(f"note: {note}")


def _profile(
    model: Path, images: list[Path], prompts: list[str], plot: Path | None, device: str, dtype: str, json: Path | None
) -> None:
    """Measure and print a model's profile."""
    if not images or not prompts:
        raise ValueError("--profile: expected --image and --prompt")
    for prompt in prompts:
        a_question("--prompt", prompt)
    from vlmrewrite.cli.profile import profile_folder
    from vlmrewrite.report import check_plot

    if plot is not None:
        check_plot(plot)
    with progress_bar() as progress:
        task = progress.add_task("load")

        def show(text: str, done: int, total: int) -> None:
            progress.update(task, description=text, completed=done, total=total)

        found, about = profile_folder(model, images, prompts, device, dtype, show)
    if plot is not None:
        found.plot(plot)
    if as_json(json, about | found.to_dict()):
        return
    print(f"{about['class']}, {about['dtype']} on {about['device']}\n\n{found}")
    if plot is not None:
        print(f"plot: {plot}")
