"""`vlmrewrite.tune` on the digits model against the best of many random recipes of equal cost, on other questions.

    python -m benchmarks.tune --out tune.json                    # three budgets, three seeds; hours on two cores
    python -m benchmarks.tune --out /tmp/t.json --budget 0.25 --seed 0 --random 20 --questions 60 --judges 100

Random recipes are drawn from the same space, each solved for the same budget. An answer counts if the first token is
the right word. The best of the random ones is chosen on the very questions that judge, which is to its favour; both are
then asked more questions, which neither was chosen by. The file is written behind each run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import torch

import vlmrewrite as vr
from vlmrewrite.evaluate import paired
from vlmrewrite.plan import Pass
from vlmrewrite.tune import Prompts, Space, solve

DIGITS: Any = importlib.import_module("examples.digits.model")
SCENES: Any = importlib.import_module("examples.digits.scenes")
BUDGETS, SEEDS, BATCH = (0.5, 0.25, 0.125), (0, 1, 2), 16
JUDGES, MORE = 900, 901
"""Seeds of the questions that judge; those of a search have its own seed and a hundred."""


def random_recipes(space: Space, prompts: Prompts, share: float, number: int, seed: int) -> list[tuple[Pass, ...]]:
    """Different recipes that a budget buys."""
    study, found = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed)), dict[str, tuple[Pass, ...]]()
    while len(found) < number:
        shape = space.draw(study.ask())
        solved = None if shape is None else solve(shape, prompts, "flops", share)
        if solved is not None:
            found[repr(solved.passes)] = solved.passes
    return list(found.values())


def right(prompts: Prompts, words: Sequence[int], passes: Sequence[Pass]) -> list[float]:
    """Whether the first token is the right word, 1 or 0 for each question."""
    said = torch.cat(prompts.next_tokens(passes)(0, len(prompts.sizes))).argmax(1)
    return [float(a == b) for a, b in zip(said.tolist(), words, strict=True)]


def asked_of(model: Any, processor: Any, number: int, seed: int) -> tuple[Prompts, Sequence[int]]:
    """Held-out questions, and the tokens of the right words."""
    records = SCENES.held_out_questions(number, seed)
    batches = [dict(DIGITS.encode(processor, records[i : i + BATCH])) for i in range(0, number, BATCH)]
    return Prompts(model, batches), processor.tokenizer.convert_tokens_to_ids([r.answer for r in records])


def measured(options: argparse.Namespace, share: float, seed: int) -> dict[str, Any]:
    """One search, and what random recipes do on the questions that judge."""
    model, processor = DIGITS.load()
    records = SCENES.held_out_questions(options.questions, 100 + seed)
    asked = [{"image": r.image, "prompt": r.question, "answer": r.answer, "kind": r.kind} for r in records]
    begun, worked = time.perf_counter(), time.process_time()
    found = vr.tune(
        model, processor, asked, {"flops": share}, None, trials=options.trials, seed=seed, batch=BATCH, max_new_tokens=4
    )
    took = {"seconds": time.perf_counter() - begun, "process_seconds": time.process_time() - worked}
    prompts, words = asked_of(model, processor, options.judges, JUDGES)
    drawn = random_recipes(Space(found.profile), prompts, share, options.random, seed)
    scored = [(right(prompts, words, passes), passes) for passes in drawn]
    best, passes = max(scored, key=lambda x: sum(x[0]))
    mine, plain = right(prompts, words, found.best.passes), right(prompts, words, [])
    ahead, more = paired(best, mine), asked_of(model, processor, options.more, MORE)
    again, other, unmodified = right(*more, found.best.passes), right(*more, passes), right(*more, [])
    fair = paired(other, again)
    return {
        "budget": share,
        "seed": seed,
        **took,
        "trials": options.trials,
        "questions": options.questions,
        "judges": options.judges,
        "random": len(drawn),
        "unmodified": sum(plain) / len(plain),
        "tuned": sum(mine) / len(mine),
        "tuned_passes": repr(found.best.passes),
        "tuned_flops": (prompts.shares(found.best.passes) or {})["flops"],
        "best_random": sum(best) / len(best),
        "best_random_passes": repr(passes),
        "all_random": sorted(sum(x) / len(x) for x, _ in scored),
        "difference": ahead.difference,
        "interval": ahead.interval,
        "more": {
            "questions": options.more,
            "unmodified": sum(unmodified) / len(unmodified),
            "tuned": sum(again) / len(again),
            "best_random": sum(other) / len(other),
            "difference": fair.difference,
            "interval": fair.interval,
        },
        "verdict": found.verdict,
        "notes": found.notes,
    }


def main() -> None:
    """Measure all budgets and seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", type=float, action="append", help="share of the FLOPs; may be given several times")
    parser.add_argument("--seed", type=int, action="append", help="may be given several times")
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--questions", type=int, default=800, help="that are searched on, and held out of that")
    parser.add_argument("--judges", type=int, default=300, help="other questions")
    parser.add_argument("--more", type=int, default=1500, help="questions that judge once more")
    parser.add_argument("--random", type=int, default=200, help="recipes")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    before = json.loads(options.out.read_text()) if options.out.exists() else []
    found = {(run["budget"], run["seed"]): run for run in before}
    for share in options.budget or BUDGETS:
        for seed in options.seed or SEEDS:
            run = measured(options, share, seed)
            found[share, seed] = run
            options.out.write_text(json.dumps([*found.values()], indent=1) + "\n")
            told = {key: run[key] for key in ("budget", "seed", "seconds", "tuned", "best_random", "interval", "more")}
            print(json.dumps(told), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
