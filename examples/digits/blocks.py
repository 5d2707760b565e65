"""Blocks trained on the digits model, and what they are worth: before and after on held-out questions.

    python -m examples.digits.blocks dpvr --output digits-dpvr            # from the root of the repository
    python -m examples.digits.blocks router --output digits-router

Questions to learn are about scenes of the scans that the model was trained on, those that judge about held-out ones.
``dpvr`` is the shipped recipe. ``router`` chooses among three configurations; beside it stand others that are the same
for all questions, of about its cost.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import vlmrewrite as vr
from vlmrewrite.evaluate import Evaluation
from vlmrewrite.passes import VISOR
from vlmrewrite.recipe import shipped_recipes

from .model import CHECKPOINT, load
from .questions import ask
from .scenes import SceneSampler, held_out_questions, split_scans

VARIANTS, BACKGROUNDS = 4, 400
CHAIN: list[dict[str, Any]] = [
    {"cross_layers": 0.3333},
    {"self_layers": [0], "cross_layers": 1.0},
    {"self_layers": 1.0},
]
JUDGES = 40
"""Seed of the held-out questions; other runs have others."""


def rows(n: int, seed: int, per_scene: int = 4) -> list[dict[str, Any]]:
    """``n`` questions to learn, ``per_scene`` about each scene, as :func:`vlmrewrite.train` takes them."""
    from PIL import Image

    sampler, found = SceneSampler(split_scans(held_out=False), VARIANTS, seed, BACKGROUNDS), list[dict[str, Any]]()
    while len(found) < n:
        pixels, digits = sampler.draw()
        image = Image.fromarray(pixels)
        for one in ask(digits, per_scene, sampler.rng):
            found.append({"image": image, "prompt": one.text, "answer": one.answer, "kind": one.kind})
    return found[:n]


def held_out(n: int) -> list[dict[str, Any]]:
    """``n`` questions about scenes of held-out scans."""
    return [
        {"image": x.image, "prompt": x.question, "answer": x.answer, "kind": x.kind}
        for x in held_out_questions(n, JUDGES)
    ]


def recipes(what: str, enough: float | None) -> tuple[vr.Recipe, list[vr.Recipe]]:
    """What is trained, and what stands beside it."""
    if what == "dpvr":
        return shipped_recipes()["dpvr"], []
    fixed = {
        "cross-all": VISOR(cross_layers=1.0),
        "one-self": VISOR(self_layers=[0], cross_layers=1.0),
        "cross-third": VISOR(cross_layers=0.3333),
    }
    return (
        vr.Recipe(name="router", passes=(VISOR(policy="router", chain=CHAIN, enough=enough),)),
        [vr.Recipe(name=name, passes=(p,)) for name, p in fixed.items()],
    )


def judge(model: Any, processor: Any, n: int, given: list[Any], output: Path | None, batch: int) -> Evaluation:
    """All of them on held-out questions."""
    return vr.evaluate(
        model, processor, held_out(n), given, max_new_tokens=4, backend="eager", batch=batch, output=output
    )


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["dpvr", "router"])
    parser.add_argument("--output", type=Path, required=True, help="folder of the blocks")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--enough", type=float, default=0.99, help="of the router")
    parser.add_argument("--distil", type=float, default=0.0)
    parser.add_argument("--samples", type=int, default=16000, help="questions to learn")
    parser.add_argument("-n", type=int, default=2000, help="held-out questions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, processor = load(args.checkpoint)
    recipe, beside = recipes(args.what, args.enough)
    done = vr.train(
        model,
        processor,
        rows(args.samples, args.seed),
        recipe,
        output=args.output,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        distil=args.distil,
        seed=args.seed,
        log_every=20,
        resume=args.resume,
    )
    print(done.log[0], done.log[-1])
    untrained = recipe.model_copy(update={"name": "untrained"})
    print(judge(model, processor, args.n, [untrained, args.output, *beside], args.output / "judged", 50))


if __name__ == "__main__":
    main()
