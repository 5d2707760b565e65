"""The command line: what there is, what a recipe would do to a model, what it does, and what that costs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from vlmrewrite.terminal import Commands, Complaints, print_json, print_table

if TYPE_CHECKING:  # what needs torch is imported by the commands that use it
    from vlmrewrite.inspection import Shape
    from vlmrewrite.recipe import Recipe

app = typer.Typer(cls=Commands, add_completion=False, rich_markup_mode=None)

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder, or a config JSON file without weights.")]
ModelFolder = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder with a model's weights and processor.")]
ImageTokens = Annotated[int | None, typer.Option(help="Tokens of each made-up image, if not as the config says.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto is the GPU if there is one.")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="auto is float32 on a CPU, else the config's.")
]


@app.callback(invoke_without_command=True)
def commands(context: typer.Context) -> None:
    """Prune and reroute the vision tokens of Hugging Face vision-language models."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with vlmrewrite."""
    from vlmrewrite import catalogue

    found = catalogue.recipes()
    if as_json:
        print_json(found)
        return
    rows = []
    for r in found:
        written = [f"{p['name']}: " + _options(p["options"]) for p in r["passes"]]
        rows.append([r["name"], r["description"], "\n".join(written)])
    print_table(["recipe", "description", "passes"], rows)


@app.command()
def passes(as_json: AsJson = False) -> None:
    """List the passes that a recipe can hold, with their options; other packages can bring passes too."""
    from vlmrewrite import catalogue

    found = catalogue.passes()
    if as_json:
        print_json(found)
        return
    rows = []
    for p in found:
        options = [
            f"{o['name']}: {o['type']}" + ("" if o["required"] else f" = {o['default']!r}") for o in p["options"]
        ]
        rows.append([p["name"], p["description"], "\n".join(options), p["package"]])
    print_table(["pass", "what it does", "options", "package"], rows)
    print("Budget: int tokens of an image, or float fraction of them. Depth: int layer, or float fraction of depth.")


@app.command()
def inspect(
    model: Model,
    recipe: Annotated[str | None, typer.Option(help="What to plan: a shipped recipe's name or a YAML file.")] = None,
    text: Annotated[int | None, typer.Option(help="Text tokens in each row of a made-up prompt [64].")] = None,
    images: Annotated[int | None, typer.Option(help="Images in each row [1].")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of the batch [1].")] = None,
    image_tokens: ImageTokens = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Of weights and K/V [bfloat16; with --profile float32 on a CPU, else the config's]."),
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure what vision tokens do in each layer, with weights and images.")
    ] = False,
    image: Annotated[list[Path] | None, typer.Option(help="Image file to profile; may be given several times.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Question about all images, or one for each, in their order.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the profile into this file.")] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"] | None, typer.Option(help="Where to profile [auto: the GPU if there is one].")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's layers and what a recipe would do to them, without weights: tokens, FLOPs and K/V bytes.

    With --profile: measure on images, layer by layer, the attention that text pays to them, cosines between hidden
    states before and after, and the change of the next token's distribution (KL) when vision is frozen or hidden there.
    """
    made_up = {"text": text, "images": images, "rows": rows, "image_tokens": image_tokens}
    if profile:
        _unset({"recipe": recipe} | made_up, "--profile without")
        _profile(model, image or [], prompt or [], plot, device or "auto", dtype or "auto", as_json)
        return
    _unset({"image": image, "prompt": prompt, "plot": plot, "device": device}, "--profile with")
    chosen = None if recipe is None else _recipe(recipe)
    dtype = dtype or "bfloat16"
    import torch

    from vlmrewrite import catalogue
    from vlmrewrite.inspection import config_file, read_config, skeleton, summary, traced_prompt
    from vlmrewrite.program import rewrite

    config, written = read_config(model)
    counts = {name: n for name, n in made_up.items() if n is not None}
    shape, source = _shape(config, written, counts.pop("image_tokens", None), counts)
    built = skeleton(config, getattr(torch, dtype), config_file(model))
    program, _ = traced_prompt(built, shape)
    planned = program if chosen is None else rewrite(program, chosen.passes)
    count, found = sum(p.numel() for p in built.parameters()), summary(planned)
    if as_json:
        about = {"model": str(model), "class": type(built).__name__, "parameters": count, "dtype": dtype}
        about |= {"prompt": dataclasses.asdict(shape), "image_tokens_from": source}
        print_json(about | {"recipe": None if chosen is None else catalogue.recipe_data(chosen)} | found)
        return
    print(f"{type(built).__name__}, {count:,} parameters; {shape.image_tokens} tokens an image ({source})\n\n{program}")
    if chosen is None:
        return
    print(f"\nrecipe {chosen.name}")
    for p in found["passes"]:
        print(f"  {p['configuration']}: {'matched' if p['matched'] else 'REFUSED: ' + p['reason']}")
    print(f"\n{planned}\n")
    table = []
    for label, key, unit in (("tokens a layer", "tokens", 1), ("GFLOP", "flops", 1e9), ("K/V MiB", "kv_bytes", 2**20)):
        before, after = (found["totals"][when][key] / unit for when in ("before", "after"))
        table.append([label, f"{before:.4g}", f"{after:.4g}", f"÷ {before / after:.2f}"])
    print_table(["prefill", "unmodified", chosen.name, "ratio"], table)


def _profile(
    model: Path, images: list[Path], prompts: list[str], plot: Path | None, device: str, dtype: str, as_json: bool
) -> None:
    """Measure and print a model's profile."""
    if not images or not prompts:
        raise ValueError("--profile: expected --image and --prompt")
    from vlmrewrite.inspection import profile_folder
    from vlmrewrite.layerwise import check_plot

    if plot is not None:
        check_plot(plot)
    with _progress() as progress:
        task = progress.add_task("load")

        def show(text: str, done: int, total: int) -> None:
            progress.update(task, description=text, completed=done, total=total)

        found, about = profile_folder(model, images, prompts, device, dtype, show)
    if plot is not None:
        found.plot(plot)
    if as_json:
        print_json(about | found.to_dict())
        return
    print(f"{about['class']}, {about['dtype']} on {about['device']}\n\n{found}")
    if plot is not None:
        print(f"plot: {plot}")


@app.command()
def apply(
    model: ModelFolder,
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name, or a YAML file.")],
    image: Annotated[list[Path], typer.Option(help="Image file; may be given several times.")],
    prompt: Annotated[str, typer.Option(help="Question about the images.")],
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 32,
    backend: Annotated[Literal["auto", "eager", "inductor"], typer.Option(help="What runs the graph.")] = "auto",
    kernels: Annotated[Literal["auto", "reference", "triton"], typer.Option(help="Which kernels run.")] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Answer a question about images without and with a recipe, and report what the recipe did."""
    chosen = _recipe(recipe)
    _at_least("--max-new-tokens", max_new_tokens, 1)
    from vlmrewrite import loading
    from vlmrewrite.inspection import read_config
    from vlmrewrite.install import applied, report

    where, (config, _) = loading.device_of(device), read_config(model)
    kind, pictures = loading.dtype_of(dtype, config, where), loading.read_images(image)
    processor = loading.read_processor(model)
    inputs = loading.question(processor, prompt, pictures).to(where, dtype=kind)
    loaded = loading.with_weights(model, kind, where)

    def answer() -> str:
        ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return str(processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]).strip()

    before = answer()
    with applied(loaded, chosen, backend=backend, kernels=kernels):
        after, what = answer(), report(loaded)
    width = max(len("unmodified"), len(chosen.name))
    print(f"{'unmodified':{width}}  {before}\n{chosen.name:{width}}  {after}\n\n{what}")


@app.command()
def bench(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="Model folder, or a config JSON file without weights.")
    ] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="What to measure; may be given several times.")] = None,
    text: Annotated[int | None, typer.Option(help="Text tokens in each row of a made-up prompt [64].")] = None,
    images: Annotated[int | None, typer.Option(help="Images in each row [1].")] = None,
    rows: Annotated[int | None, typer.Option(help="Rows of the batch [1].")] = None,
    image_tokens: ImageTokens = None,
    image: Annotated[list[Path] | None, typer.Option(help="Image file, in place of a made-up prompt.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Question about the image files.")] = None,
    repeat: Annotated[int, typer.Option(help="Counted rounds, after one that is not counted.")] = 7,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded in each round.")] = 16,
    backend: Annotated[Literal["eager", "inductor"], typer.Option(help="What runs all of them.")] = "eager",
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Do without the model's weights.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: Annotated[Path | None, typer.Option("--json", help="Write everything that was measured to this file.")] = None,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="In place of a model, measure the kernels and what they compete with.")
    ] = False,
    kernel: Annotated[list[str] | None, typer.Option(help="Family of kernels; may be given several times.")] = None,
    sizes: Annotated[
        list[str] | None, typer.Option(help="Model to take the kernels' sizes from, or tiny; likewise.")
    ] = None,
    against: Annotated[list[str] | None, typer.Option(help="reference, inductor or library; likewise.")] = None,
) -> None:
    """Measure a model without and with recipes, taking turns: prefill, decoding, peak memory and K/V bytes.

    Or, with --kernels, each kernel and what it competes with.
    """
    if out is not None and not out.parent.is_dir():
        raise ValueError(f"--json: expected a file in a folder that exists, got {str(out)!r}")
    if kernels:
        if model is not None:
            raise ValueError("expected MODEL or --kernels, not both")
        _unset(
            {"recipe": recipe, "image": image, "prompt": prompt, "text": text, "images": images}, "--kernels without"
        )
        _bench_kernels(device, dtype, rows, repeat, out, {"families": kernel, "sizes": sizes, "against": against})
        return
    _unset({"kernel": kernel, "sizes": sizes, "against": against}, "--kernels with")
    if model is None or not recipe:
        raise ValueError("expected MODEL and --recipe, or --kernels")
    chosen = [_recipe(name) for name in recipe]
    names = ["unmodified", *(r.name for r in chosen)]
    if len(set(names)) < len(names):
        raise ValueError(f"--recipe: expected recipes with names of their own, got {', '.join(names[1:])}")
    _at_least("--repeat", repeat, 1)
    _at_least("--new-tokens", new_tokens, 2)
    given = {"text": text, "images": images, "rows": rows, "image_tokens": image_tokens}
    made_up = {name: n for name, n in given.items() if n is not None}
    if bool(image) != (prompt is not None) or (image and made_up):
        raise ValueError("expected both --image and --prompt, or any of --text, --images, --rows, --image-tokens")
    from vlmrewrite import loading
    from vlmrewrite.bench import bench as measure
    from vlmrewrite.inspection import config_file, read_config, traced_prompt

    where, (config, written) = loading.device_of(device), read_config(model)
    kind = loading.dtype_of(dtype, config, where)
    shape = None if image else _shape(config, written, made_up.pop("image_tokens", None), made_up)[0]
    inputs: Any = None
    if image and prompt is not None:
        inputs = loading.question(loading.read_processor(model), prompt, loading.read_images(image))
        inputs = dict(inputs.to(where, dtype=kind))
    if random_weights:
        loaded = loading.with_random_weights(config, config_file(model), kind, where)
    else:
        loaded = loading.with_weights(model, kind, where)
    if shape is not None:
        _, inputs = traced_prompt(loaded, shape)
    with _progress() as progress:
        task = progress.add_task("", total=(repeat + 1) * len(names))
        done = iter(range((repeat + 1) * len(names)))
        result = measure(
            loaded,
            inputs,
            chosen,
            backend=backend,
            repeat=repeat,
            new_tokens=new_tokens,
            progress=lambda text: progress.update(task, description=text, completed=next(done)),
        )
        progress.update(task, description="done", completed=(repeat + 1) * len(names))
    result = {"model": str(model), "prompt": str(shape) if shape is not None else prompt} | result
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")
    print(", ".join(f"{k} {result[k]}" for k in ("device", "threads", "torch", "dtype", "backend", "prompt", "repeat")))
    print_table(
        ["recipe", "prefill ms", "decode tokens/s", "peak\nMiB", "K/V MiB", "FLOPs", "of FLOP\nratio"],
        [_measured(row) for row in result["rows"]],
    )


def _bench_kernels(
    device: str, dtype: str, rows: int | None, repeat: int, out: Path | None, chosen: dict[str, Any]
) -> None:
    from vlmrewrite import loading
    from vlmrewrite.bench import bench_kernels

    where = loading.device_of(device)
    kind = None if dtype == "auto" else loading.dtype_of(dtype, None, where)
    if rows is not None:
        chosen["batches"] = [rows]
    with _progress() as progress:
        task = progress.add_task("", total=None)
        result = bench_kernels(
            where,
            kind,
            repeat=repeat,
            progress=lambda text: progress.update(task, description=text),
            **{name: value for name, value in chosen.items() if value is not None},
        )
        progress.update(task, description="done")
    if out is not None:
        out.write_text(json.dumps(result, indent=2) + "\n")
    print(", ".join(f"{k} {result[k]}" for k in ("device", "threads", "torch", "triton", "dtype", "repeat")))
    if result["no_triton"] is not None:
        print(f"no Triton kernels: {result['no_triton']}")
    copy, matmul = result["ceiling"]["copy"], result["ceiling"]["matmul"]
    print(f"ceiling: copy {copy / 1e9:.4g} GB/s, matmul {matmul / 1e12:.4g} TFLOP/s")
    headings = ["kernel", "tokens", "rows", "ms", "others take\n× as long", "of\nceiling", "left out"]
    print_table(headings, [_measured_kernel(row) for row in result["rows"]])


def _measured_kernel(row: dict[str, Any]) -> list[str]:
    """A row of the table of kernels."""
    base = row.get("base")
    reached = row.get("of_copy", row.get("of_matmul"))
    return [
        f"{row['kernel']}: {row['case']}",
        str(row["tokens"]),
        str(row["batch"]),
        "" if base is None else f"{row['milliseconds'][base]:.4g} ({base})",
        "\n".join(f"{name} {ratio:.2f}" for name, ratio in row.get("ratios", {}).items()),
        "" if reached is None else f"{reached:.0%}",
        "\n".join(f"{name}: {why}" for name, why in row["skipped"].items()),
    ]


def _measured(row: dict[str, Any]) -> list[str]:
    """A row of the table of measurements."""
    ratio, reached = row.get("flop_ratio"), row.get("prefill_speedup_of_flop_ratio")
    return [
        row["name"],
        f"{row['prefill_median'] * 1e3:.4g} (×{row['prefill_speedup']:.2f})",
        f"{row['decode_tokens_per_second']:.4g} (×{row['decode_speedup']:.2f})",
        "unknown" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.4g}",
        f"{row['kv_bytes'] / 2**20:.4g} (÷{row['kv_ratio']:.2f})",
        "" if ratio is None else f"÷{ratio:.2f}",
        "" if reached is None else f"{reached:.0%}",
    ]


def _progress() -> Progress:
    """A bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _unset(options: dict[str, Any], expected: str) -> None:
    """Raise ValueError if any of the options was given."""
    given = [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None and value != []]
    if given:
        raise ValueError(f"expected {expected} {', '.join(given)}")


def _recipe(name: str) -> Recipe:
    from vlmrewrite.recipe import Recipe

    try:
        return Recipe.load(name)
    except ValueError as e:
        raise Complaints(str(e)) from e


def _shape(config: Any, written: dict[str, Any], image_tokens: int | None, counts: dict[str, int]) -> tuple[Shape, str]:
    """The made-up prompt, and where its number of tokens an image comes from."""
    from vlmrewrite import inspection

    tokens, source = (
        (image_tokens, "as given") if image_tokens is not None else inspection.image_tokens(config, written)
    )
    return inspection.Shape(tokens, **counts), source


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{option}: expected at least {least}, got {value}")


def _options(values: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v!r}" for k, v in values.items())
