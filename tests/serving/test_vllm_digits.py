"""The bundled model under vLLM answers as under transformers, with the same recipe and the same kept tokens."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

import vlmrewrite as vr
from examples.digits.model import CHECKPOINT, load
from examples.digits.scenes import held_out_questions
from tests.serving.engine import ask
from vlmrewrite.passes import Random, Stride
from vlmrewrite.recipe import Recipe, shipped_recipes
from vlmrewrite.serving import what_runs
from vlmrewrite.serving.vllm import overrides

PROMPTS = 200
ARGS = {"model_impl": "transformers", "max_model_len": 256}


def serving_capable() -> list[Recipe]:
    own = [Recipe(name="stride-16", passes=(Stride(16),)), Recipe(name="two", passes=(Stride(0.5), Random(0.5)))]
    return own + [r for r in shipped_recipes().values() if all(p.reason is None for p in what_runs(r, depth=8))]


def before_the_decoder(recipe: Recipe) -> list[Any]:
    """Its passes without what an engine leaves out."""
    return [dataclasses.replace(p, refine=None) if hasattr(p, "refine") else p for p in recipe.passes]


def answers(model: Any, processor: Any, scenes: list[Any]) -> list[str]:
    found = []
    for scene in scenes:
        inputs = processor(images=scene.image, text=f"<image> {scene.question}", return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        found.append(processor.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def test_text_and_kept_tokens(tmp_path: Path) -> None:
    model, processor = load()
    scenes, recipes = held_out_questions(PROMPTS), serving_capable()
    plain, expected = answers(model, processor, scenes), []
    first = processor(images=scenes[0].image, text=f"<image> {scenes[0].question}", return_tensors="pt")
    image = (first["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    for recipe in recipes:
        kept = []
        with vr.applied(model, before_the_decoder(recipe)):
            texts = answers(model, processor, scenes)
            for scene in scenes:
                inputs = processor(images=scene.image, text=f"<image> {scene.question}", return_tensors="pt")
                with torch.no_grad():
                    model(**inputs)
                [*_, last] = vr.kept_tokens(model)
                kept.append((last.vision[0].nonzero()[:, 0] - image[0]).tolist())
        expected.append((texts, kept))
    batch = [{"prompt": f"<image> {s.question}", "multi_modal_data": {"image": s.image}} for s in scenes]
    engine = {"model": CHECKPOINT, "batches": [batch], "tokens": 4, "ignore_eos": False}
    engines = [engine | {"args": ARGS}] + [engine | {"args": ARGS | {"hf_overrides": overrides(r)}} for r in recipes]
    [unmodified, *found] = ask(tmp_path, engines)
    assert [x["text"].strip() for x in unmodified["batches"][0]] == plain and unmodified["kept"] == []
    for recipe, (texts, kept), one in zip(recipes, expected, found, strict=True):
        made = one["batches"][0]
        assert [x["text"].strip() for x in made] == texts, recipe.name
        assert one["kept"] == kept, recipe.name
        assert {x["prompt"] for x in made} == {first["input_ids"].shape[1] - len(image) + len(kept[0])}
    assert sum(texts != plain for texts, _ in expected) > len(recipes) / 2, "recipes change answers"
