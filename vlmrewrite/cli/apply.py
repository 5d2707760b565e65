"""`vlmrewrite apply`: a question about images, answered without and with a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from vlmrewrite.cli.app import app
from vlmrewrite.cli.options import Device, Dtype, ModelFolder, a_question, at_least, recipe_named


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
    chosen = recipe_named(recipe)
    a_question("--prompt", prompt)
    at_least("--max-new-tokens", max_new_tokens, 1)
    from vlmrewrite.api import applied, report
    from vlmrewrite.cli import loading
    from vlmrewrite.cli.config import local, read_config

    model = local(model, weights=True)
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
