"""`vlmrewrite serve-args`: an engine's arguments for a recipe."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer

from vlmrewrite.cli.app import app
from vlmrewrite.cli.options import ImageSize, ImageTokens, Model, pixels, recipe_named

_FOLDER = "MODEL"
"""In the command, in place of a model of which there is a configuration alone."""


@app.command("serve-args")
def serve_args(
    model: Model,
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name or a YAML file.")],
    image_tokens: ImageTokens = None,
    image_size: ImageSize = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone: arguments of vllm.LLM.")] = False,
) -> None:
    """Print what vLLM needs to serve a model with a recipe, and what of the recipe will run there. No weights are read.

    A pass of which nothing can run there is an error that says why. Warnings go to the standard error.
    """
    if image_tokens is not None and image_size is not None:
        raise ValueError("expected one of --image-size and --image-tokens")
    picture, chosen = None if image_size is None else pixels(image_size), recipe_named(recipe)
    import torch

    from vlmrewrite.cli.config import config_file, local, read_config, skeleton
    from vlmrewrite.cli.prompt import made_up_shape
    from vlmrewrite.serving import vllm

    _warn_if_not_found()
    given, model = model, local(model)
    config, written = read_config(model)
    depth = config.get_text_config(decoder=True).num_hidden_layers
    before = vllm.Serving(chosen, depth, None).before
    shape, source = made_up_shape(config, written, image_tokens, {}, picture, model)
    tile = _tile(skeleton(config, torch.float32, config_file(model)), config)
    args: dict[str, Any] = {"hf_overrides": vllm.overrides(chosen, tile)}
    if before.by_row:
        args["limit_mm_per_prompt"] = {"image": 1}
    if as_json:
        print(json.dumps(args))
        return
    for line in before.told(shape.image_tokens):
        print(line)
    print(f"of an image of {shape.image_tokens} tokens: {source}")
    if tile not in (None, shape.image_tokens):
        print(f"an image of several tiles: of each tile of {tile} tokens")
    if not before.by_image:
        print("what is kept of an image depends on those in front of it: the same image elsewhere is encoded anew")
    if model.is_file():
        print(f"write the model's folder or name for {_FOLDER}: {given} is a configuration alone")
    command = ["vllm", "serve", _FOLDER if model.is_file() else str(given)]
    for name, value in args.items():
        command += [f"--{name.replace('_', '-')}", json.dumps(value)]
    print(f"\n{shlex.join(command)}")


def _warn_if_not_found() -> None:
    """Say so if an engine would not find the plug-in by what is installed of vlmrewrite."""
    if not entry_points(group="vllm.general_plugins", name="vlmrewrite"):
        typer.echo(
            "warning: the installed vlmrewrite has no entry point in vllm.general_plugins, so that vLLM does not load"
            " it in this environment and would IGNORE the recipe: install vlmrewrite again",
            err=True,
        )


def _tile(model: Any, config: Any) -> int | None:
    """Tokens of a tile, if the encoder gives tiles of their own when it is told of nothing but tiles; else None."""
    import torch

    from vlmrewrite.hf import encode_images, encoded_images

    tower = config.vision_config
    size, channels = getattr(tower, "image_size", None), getattr(tower, "num_channels", 3)
    sides = size if isinstance(size, list | tuple) else (size, size)
    if not all(isinstance(side, int) for side in sides):
        return None
    pixels = torch.empty(2, channels, *sides, device="meta")
    ids = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    try:
        with torch.no_grad():
            made = encode_images(model, {"input_ids": ids, "pixel_values": pixels})["mm_encoder_outputs"]["image"]
            lengths = next(iter(encoded_images(made).lengths.values()))
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
        # it takes more than tiles, such as sizes or grids, and so knows which belong together
        typer.echo(f"note: budgets are of images, as tiles alone are not encoded ({type(e).__name__}: {e})", err=True)
        return None
    return lengths[0] if len(lengths) == 2 and lengths[0] == lengths[1] else None
