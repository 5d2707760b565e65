"""Tiny models of several families: greedy tokens under vLLM are those under transformers, with the same recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlmrewrite as vr
from tests.serving.engine import SECOND_RUNNER, ask
from vlmrewrite.passes import STS, DivPrune, Random, Stride
from vlmrewrite.recipe import Recipe
from vlmrewrite.serving.vllm import overrides

RECIPES = [
    Recipe(name="sts", passes=(STS(keep=0.5, refine=None),)),
    Recipe(name="random", passes=(Random(5),)),
    Recipe(name="two", passes=(Stride(0.75), DivPrune(0.5))),
]
STEPS, EACH = 4, 8
CLOSE = 0.02
"""Of logits between 3 and 5; what other kernels of attention make of them differs by up to a hundredth."""

SIZES = [(32, 32), (48, 32), (32, 64), (40, 40)]


def picture(seed: int, size: tuple[int, int]) -> Any:
    noise = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(noise.numpy())


def prompt(image: str, images: int, between: str, seed: int) -> tuple[str, list[Any]]:
    """A row with images of several sizes, with text between them or next to each other."""
    text = f"w{20 + seed} w{30 + images} " + between.join([image] * images) + f" w{40 + seed} w{41 + images}"
    return text, [picture(10 * seed + i, SIZES[(seed + i) % 4]) for i in range(images)]


def generated(model: Any, inputs: Any, steps: int = STEPS) -> tuple[int, list[int], float]:
    """How many tokens a prompt has, those that transformers generates, and by how much the closest choice was won."""
    with torch.no_grad():
        made = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
    n = inputs["input_ids"].shape[1]
    best = torch.stack(made.scores).topk(2).values
    return n, made.sequences[0, n:].tolist(), float((best[..., 0] - best[..., 1]).min())


def clear_rows(model: Any, processor: Any, image: str, marked: bool, recipes: list[Recipe]) -> Any:
    """Rows with 0 to 3 images, and what transformers makes of them without and with each recipe.

    Of the rows that each may be, the one whose closest choice is the least close: the rounding of other kernels must
    not decide any.
    """
    shapes = [(1, ""), (2, " w19 "), (0, ""), (1, " w19 "), (3, ""), (2, "")]
    rows, inputs = [], []
    for i, (images, between) in enumerate(shapes):
        for seed in range(i, EACH * len(shapes), len(shapes)):
            row = prompt(image, images, " w19 " if marked else between, seed)
            own = [row[1]] if marked and images else row[1] or None  # a processor may want images by row
            rows.append(row)
            inputs.append(processor(images=own, text=row[0], return_tensors="pt"))
            if "token_type_ids" in inputs[-1]:  # an engine's attention is causal inside of images too, on a CPU
                inputs[-1]["token_type_ids"].zero_()
    found = [[generated(model, x) for x in inputs]]
    for recipe in recipes:
        with vr.applied(model, recipe):
            found.append([generated(model, x) for x in inputs])
    margins = torch.tensor([[margin for *_, margin in each] for each in found]).amin(0).reshape(len(shapes), EACH)
    assert float(margins.amax(1).min()) > CLOSE, margins
    chosen = [EACH * i + j for i, j in enumerate(margins.argmax(1).tolist())]
    return [rows[i] for i in chosen], [[each[i] for i in chosen] for each in found]


def requests(rows: list[tuple[str, list[Any]]]) -> list[dict[str, Any]]:
    return [{"prompt": t} | ({"multi_modal_data": {"image": i}} if i else {}) for t, i in rows]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl", "gemma3", "llava_onevision"])
def test_greedy_tokens(family: str, tmp_path: Path) -> None:
    """By the engine's class and transformers' (its Gemma 3 on a CPU is another model, with and without recipe).

    The engine's class in both of its model runners.
    """
    from tests.serving.folders import saved

    model, processor, image = saved(family, tmp_path / "own")
    saved(family, tmp_path / "plain", engine=False)
    rows, expected = clear_rows(model, processor, image, family == "gemma3", RECIPES)
    tile, whole = (16 if family == "internvl" else None), {"max_model_len": 256}
    given = [whole, *(whole | {"hf_overrides": overrides(recipe, tile)} for recipe in RECIPES)]
    ways = [("own", "auto", {}), ("own", "auto", SECOND_RUNNER)]
    ways += [("plain", "transformers", {})] if family != "gemma3" else []
    for name, implementation, settings in ways:
        how = {"model_impl": implementation}
        engines = [
            {"model": tmp_path / name, "args": a | how, "batches": [requests(rows)], "tokens": STEPS} for a in given
        ]
        found = ask(tmp_path, engines, settings=settings)
        for one, rows_expected in zip(found, expected, strict=True):
            assert "error" not in one, one.get("error")
            assert one["runner"] == (
                "vllm.v1.worker.cpu.model_runner" if settings else "vllm.v1.worker.cpu_model_runner"
            )
            assert [x["tokens"] for x in one["batches"][0]] == [tokens for _, tokens, _ in rows_expected]
        [plain, *fewer] = [[x["prompt"] for x in one["batches"][0]] for one in found]
        assert plain == [n for n, *_ in expected[0]]
        assert all(a < b or b == 4 for lengths in fewer for a, b in zip(lengths, plain, strict=True))
