"""`vlmrewrite apply`: a question about images, answered without and with a recipe."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from vlmrewrite.cli.app import app
from vlmrewrite.cli.options import (
    Backend,
    Device,
    Dtype,
    Json,
    Kernels,
    LongestAnswer,
    ModelFolder,
    a_question,
    at_least,
    recipe_named,
)
from vlmrewrite.cli.terminal import as_json, check_json


@app.command()
def apply(
    model: ModelFolder,
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name, or a YAML file.")],
    image: Annotated[list[Path], typer.Option(help="Image file; may be given several times.")],
    prompt: Annotated[str, typer.Option(help="Question about the images.")],
    max_new_tokens: LongestAnswer = 32,
    backend: Backend = "auto",
    kernels: Kernels = "auto",
    timing: Annotated[
        bool, typer.Option("--timing", help="Answer twice, and tell the seconds of the first time and the second.")
    ] = False,
    detail: Annotated[bool, typer.Option("--detail", help="Report each kernel that was chosen, and why.")] = False,
    page: Annotated[Path | None, typer.Option("--html", help="Write the report to this file, as HTML.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = None,
) -> None:
    """Answer a question about images without and with a recipe, and report what the recipe did.

    With --timing: the first answer with a recipe takes longer, as the model is captured, rewritten and, by Inductor,
    compiled then. To compare a model's speed with and without a recipe, use bench.
    """
    check_json(json)
    if page is not None and not page.parent.is_dir():
        raise ValueError(f"--html: expected a file in a folder that exists, got {str(page)!r}")
    chosen = recipe_named(recipe)
    a_question("--prompt", prompt)
    at_least("--max-new-tokens", max_new_tokens, 1)
    from vlmrewrite.api import applied, processor_set, report
    from vlmrewrite.cli import loading
    from vlmrewrite.cli.config import local, read_config
    from vlmrewrite.hf import refuse_smaller

    given, model = model, local(model, weights=True)
    where, (config, _) = loading.device_of(device), read_config(model)
    kind, pictures = loading.dtype_of(dtype, config, where), loading.read_images(image)
    processor = loading.read_processor(model)
    made = chosen.processor(processor)
    inputs = [loading.question(x, prompt, pictures).to(where, dtype=kind) for x in (processor, made)]
    loaded = loading.with_weights(model, kind, where)
    if made is not processor:
        refuse_smaller(loaded, inputs[1])

    def answer(name: str, inputs: Any) -> dict[str, Any]:
        seconds = []
        for _ in range(2 if timing else 1):
            begun = time.perf_counter()
            ids = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
            new = ids[:, inputs["input_ids"].shape[1] :].cpu()  # which waits for a GPU
            seconds.append(time.perf_counter() - begun)
        text = str(processor.batch_decode(new, skip_special_tokens=True)[0]).strip()
        told = {"name": name, "answer": text, "prompt_tokens": inputs["input_ids"].shape[1], "new_tokens": new.shape[1]}
        return told | ({"seconds_first": seconds[0], "seconds": seconds[1]} if timing else {})

    answers = [answer("unmodified", inputs[0])]
    with processor_set(), applied(loaded, chosen, backend=backend, kernels=kernels):
        answers.append(answer(chosen.name, inputs[1]))
        what = report(loaded)
    if page is not None:
        page.write_text(what.to_html(), encoding="utf-8")
    about: dict[str, Any] = {"model": str(given), "class": type(loaded).__name__, "device": str(where)}
    about |= {"dtype": str(kind).removeprefix("torch."), "images": list(map(str, image)), "prompt": prompt}
    if as_json(json, about | {"answers": answers, "report": what.to_dict()}):
        return
    width = max(len(one["name"]) for one in answers)
    for one in answers:
        print(f"{one['name']:{width}}  {one['answer']}")
    for one in answers if timing else ():
        rate = one["new_tokens"] / one["seconds"]
        took = f"{one['seconds_first']:.3g} s the first time, {one['seconds']:.3g} s the second"
        print(f"{one['name']:{width}}  {took} ({one['new_tokens']} tokens, {rate:.3g} a second)")
    if made is not processor:
        before, after = (one["prompt_tokens"] for one in answers)
        print(f"{chosen.name:{width}}  was given smaller pictures: {after} tokens of a prompt in place of {before}")
    print(f"\n{what.detail() if detail else what}")
