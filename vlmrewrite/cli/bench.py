"""`vlmrewrite bench`: models with and without recipes, or kernels, measured side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vlmrewrite.cli.app import app
from vlmrewrite.cli.options import (
    Device,
    Dtype,
    ImageTokens,
    Json,
    a_question,
    at_least,
    progress_bar,
    recipe_named,
    steps,
    unset,
)
from vlmrewrite.cli.terminal import as_json, check_json, print_table


@app.command()
def bench(
    model: Annotated[
        Path | None, typer.Argument(metavar="MODEL", help="Model folder, a model on the Hub, or a config JSON file.")
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
    backend: Annotated[
        Literal["eager", "inductor", "inductor-whole"], typer.Option(help="What runs all of them.")
    ] = "eager",
    native: Annotated[
        bool, typer.Option("--native", help="Also measure a hand-written loop on the tokens that each recipe kept.")
    ] = False,
    random_weights: Annotated[bool, typer.Option("--random-weights", help="Do without the model's weights.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = None,
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

    With --native, each recipe also against a hand-written eager loop over the model's own layers, on the tokens that
    the recipe kept: "of native" is the loop's time by the recipe's. Ratios go by process time where torch runs on one
    CPU thread (OMP_NUM_THREADS=1), else by the clock on the wall.

    Or, with --kernels, each kernel and what it competes with.
    """
    check_json(json)
    if kernels:
        if model is not None:
            raise ValueError("expected MODEL or --kernels, not both")
        unset({"recipe": recipe, "image": image, "prompt": prompt, "text": text, "images": images}, "--kernels without")
        unset({"native": native or None}, "--kernels without")
        _bench_kernels(device, dtype, rows, repeat, json, {"families": kernel, "sizes": sizes, "against": against})
        return
    unset({"kernel": kernel, "sizes": sizes, "against": against}, "--kernels with")
    if model is None or not recipe:
        raise ValueError("expected MODEL and --recipe, or --kernels")
    chosen = [recipe_named(name) for name in recipe]
    names = ["unmodified", *(r.name for r in chosen)]
    if len(set(names)) < len(names):
        raise ValueError(f"--recipe: expected recipes with names of their own, got {', '.join(names[1:])}")
    at_least("--repeat", repeat, 1)
    at_least("--new-tokens", new_tokens, 2)
    if native and backend != "eager":
        raise ValueError(f"--native measures an eager loop: expected --backend eager, got {backend}")
    counts = {"text": text, "images": images, "rows": rows, "image_tokens": image_tokens}
    made_up = {name: n for name, n in counts.items() if n is not None}
    pictures = [r.name for r in chosen if r.sets_processor]
    if pictures and not image:
        raise ValueError(
            f"recipe {pictures[0]!r} makes pictures smaller, and a made-up prompt has none: expected --image and"
            " --prompt"
        )
    if bool(image) != (prompt is not None) or (image and made_up):
        raise ValueError("expected both --image and --prompt, or any of --text, --images, --rows, --image-tokens")
    if prompt is not None:
        a_question("--prompt", prompt)
    from vlmrewrite.bench import bench as measure
    from vlmrewrite.cli import loading
    from vlmrewrite.cli.config import config_file, local, read_config
    from vlmrewrite.cli.prompt import captured_prompt, made_up_shape

    given, model = model, local(model, weights=not random_weights)
    where, (config, written) = loading.device_of(device), read_config(model)
    kind = loading.dtype_of(dtype, config, where)
    shape = None if image else made_up_shape(config, written, made_up.pop("image_tokens", None), made_up)[0]
    inputs: Any = None
    others = dict[str, Any]()
    if image and prompt is not None:
        own, files = loading.read_processor(model), loading.read_images(image)
        makers = {"": own} | {r.name: r.processor(own) for r in chosen if r.sets_processor}
        others = {n: dict(loading.question(p, prompt, files).to(where, dtype=kind)) for n, p in makers.items()}
        inputs = others.pop("")
    if random_weights:
        loaded = loading.with_random_weights(config, config_file(model), kind, where)
    else:
        loaded = loading.with_weights(model, kind, where)
    if shape is not None:
        _, inputs = captured_prompt(loaded, shape)
    with progress_bar() as progress:
        task = progress.add_task("", total=(repeat + 1) * len(names))
        done = iter(range((repeat + 1) * len(names)))
        result = measure(
            loaded,
            inputs,
            chosen,
            backend=backend,
            repeat=repeat,
            new_tokens=new_tokens,
            native=native,
            others=others,
            progress=lambda text: progress.update(task, description=text, completed=next(done)),
        )
        progress.update(task, description="done", completed=(repeat + 1) * len(names))
    result = {"model": str(given), "prompt": str(shape) if shape is not None else prompt} | result
    if as_json(json, result):
        return
    told = ("device", "threads", "torch", "dtype", "backend", "prompt", "repeat", "clock")
    print(", ".join(f"{k} {result[k]}" for k in told))
    headings = ["recipe", "prefill ms", "decode tokens/s", "peak\nMiB", "K/V MiB", "FLOPs", "of FLOP\nratio"]
    print_table(headings, [_measured(row) for row in result["rows"]])
    if native:
        loops = [
            [row["name"], *_beside_native(row)] for row in result["rows"] if "prefill_median" in row.get("native", {})
        ]
        print_table(["recipe", "prefill:\nnative ms", "of native", "decode:\nnative ms", "of native"], loops)
    for row in result["rows"]:
        for reason in row["passes_refused"]:
            print(f"{row['name']}: does nothing: {reason}")
        if refused := row.get("native", {}).get("refused"):
            print(f"{row['name']}: no native loop: {refused}")


def _bench_kernels(
    device: str, dtype: str, rows: int | None, repeat: int, json: Path | None, chosen: dict[str, Any]
) -> None:
    from vlmrewrite.bench import bench_kernels
    from vlmrewrite.cli import loading

    where = loading.device_of(device)
    kind = None if dtype == "auto" else loading.dtype_of(dtype, None, where)
    if rows is not None:
        chosen["batches"] = [rows]
    given = {name: value for name, value in chosen.items() if value is not None}
    with steps() as progress:
        result = bench_kernels(where, kind, repeat=repeat, progress=progress, **given)
    if as_json(json, result):
        return
    print(", ".join(f"{k} {result[k]}" for k in ("device", "threads", "torch", "triton", "dtype", "repeat")))
    if result["no_triton"] is not None:
        print(f"no Triton kernels: {result['no_triton']}")
    copy, matmul = result["ceiling"]["copy"], result["ceiling"]["matmul"]
    print(f"ceiling: copy {copy / 1e9:.4g} GB/s, matmul {matmul / 1e12:.4g} TFLOP/s")
    headings = ["kernel", "tokens", "rows", "ms", "others take\n× as long", "of\nceiling"]
    print_table(headings, [_measured_kernel(row) for row in result["rows"]])
    left_out: dict[str, list[str]] = {}
    for row in result["rows"]:
        for name, why in row["skipped"].items():
            left_out.setdefault(f"{name} ({why})", []).append(_named(row, ": "))
    for what, cases in left_out.items():
        print(f"left out: {what} of {'; '.join(dict.fromkeys(cases))}")


def _named(row: dict[str, Any], between: str) -> str:
    """The family, and the case if its inputs could be made."""
    return str(row["kernel"]) if row["case"] is None else f"{row['kernel']}{between}{row['case']}"


def _measured_kernel(row: dict[str, Any]) -> list[str]:
    """A row of the table of kernels."""
    base = row.get("base")
    reached = row.get("of_copy", row.get("of_matmul"))
    return [
        _named(row, ":\n" if len(_named(row, ": ")) > 20 else ": "),
        str(row["tokens"]),
        str(row["batch"]),
        "" if base is None else f"{row['milliseconds'][base]:.4g}\n{base}",
        "\n".join(f"{name} {ratio:.2f}" for name, ratio in row.get("ratios", {}).items()),
        "" if reached is None else f"{reached:.0%}",
    ]


def _beside_native(row: dict[str, Any]) -> list[str]:
    """For prefill and decoding of a token, the native loop's milliseconds and the efficiency."""
    loop, phases = row["native"], ("prefill", "decode")
    return [x for p in phases for x in (f"{loop[f'{p}_median'] * 1e3:.4g}", f"{loop[f'{p}_efficiency']:.0%}")]


def _measured(row: dict[str, Any]) -> list[str]:
    """A row of the table of measurements."""
    ratio, reached = row.get("flop_ratio"), row.get("prefill_speedup_of_flop_ratio")
    return [
        row["name"],
        f"{row['prefill_median'] * 1e3:.4g} (×{row['prefill_speedup']:.2f})",
        f"{row['decode_tokens_per_second']:.4g} (×{row['decode_speedup']:.2f})",
        f"{row['peak_bytes'] / 2**20:.4g}",
        f"{row['kv_bytes'] / 2**20:.4g} (÷{row['kv_ratio']:.2f})",
        "" if ratio is None else f"÷{ratio:.2f}",
        "" if reached is None else f"{reached:.0%}",
    ]
