"""`vlmrewrite serve`: transformers' own server, with a rewritten model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlmrewrite.cli.app import app
from vlmrewrite.cli.options import Backend, Device, Dtype, Kernels, ModelFolder, recipe_named


@app.command()
def serve(
    model: ModelFolder,
    recipe: Annotated[str, typer.Option(help="Recipe, YAML file or folder of trained blocks.")],
    host: Annotated[str, typer.Option(help="Where it listens.")] = "localhost",
    port: Annotated[int, typer.Option(help="The port there.")] = 8000,
    backend: Backend = "auto",
    kernels: Kernels = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Serve a model under a recipe by transformers' server, one request at a time: /v1/chat/completions and its like.

    All of a recipe runs. vLLM serves many requests at a time, with what of a recipe is before the decoder: serve-args.
    """
    chosen: Any = recipe if Path(recipe).is_dir() else recipe_named(recipe)
    from vlmrewrite import compat
    from vlmrewrite.api import apply, processor_set
    from vlmrewrite.cli import loading
    from vlmrewrite.cli.config import local, read_config
    from vlmrewrite.hf import refuse_one_size
    from vlmrewrite.recipe import Recipe
    from vlmrewrite.saving import read

    given, model = model, local(model, weights=True)
    where, (config, _) = loading.device_of(device), read_config(model)
    processor, kind = loading.read_processor(model), loading.dtype_of(dtype, config, where)
    if not getattr(processor, "chat_template", None):
        raise ValueError(
            f"{given}: expected a processor with a chat template, by which a server makes a prompt of messages; its"
            f" {type(processor).__name__} has none: save one beside it, as chat_template.jinja"
        )

    made = (chosen if isinstance(chosen, Recipe) else read(chosen).recipe).processor(processor)

    def load() -> Any:
        loaded = loading.with_weights(model, kind, where)
        if made is not processor:
            refuse_one_size(loaded, processor, made)
        with processor_set():
            return apply(loaded, chosen, backend=backend, kernels=kernels)

    compat.serve(str(given), load, made, host=host, port=port)
