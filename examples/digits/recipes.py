"""Every recipe and control on the digits model: accuracy, FLOPs, K/V bytes, and the speed of prefill and decoding.

    python -m examples.digits.recipes                        # from the root of the repository: 500 held-out questions
    python -m examples.digits.recipes -n 100 --only dpvr vtw-half --json out.json

No block is trained here: what a recipe's description says about training holds. Recipes that choose among plans are
asked one question at a time, the others in batches; costs are those of all prefills. Speed is that of a batch of
prompts, model and recipes taking turns; on a model this small, fixed costs weigh as much as tokens do.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import vlmrewrite as vr
from vlmrewrite.bench import bench
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.recipe import shipped_recipes

from .model import CHECKPOINT, answers, encode, load
from .scenes import EVALUATION_SEED, HeldOut, held_out_questions


@dataclass(frozen=True)
class Line:
    """One line of the table: costs are shares of the unmodified model's, speeds are multiples of its."""

    recipe: str
    blocks: str
    accuracy: float
    flops: float
    kv_bytes: float
    prefill: float
    decode: float


def ask(model: Any, processor: Any, records: Sequence[HeldOut], batch: int) -> tuple[float, float, float]:
    """Share of right answers, and FLOPs and K/V bytes of all prefills as shares of the unmodified model's."""
    right, before, after = 0, {"flops": 0, "kv_bytes": 0}, {"flops": 0, "kv_bytes": 0}
    for start in range(0, len(records), batch):
        some = records[start : start + batch]
        given = answers(model, processor, some, batch)
        right += sum(a == r.answer for r, a in zip(some, given, strict=True))
        totals = vr.report(model).to_dict()["totals"]
        for key in before:
            before[key] += totals["before"][key]
            after[key] += totals["after"][key]
    return right / len(records), after["flops"] / before["flops"], after["kv_bytes"] / before["kv_bytes"]


def table(lines: Sequence[Line], questions: int, prompts: int) -> Table:
    """The lines as text."""
    out = Table(title=f"{questions} held-out questions, greedy generate(), fp32; speed of {prompts} prompts at once")
    out.add_column("recipe")
    out.add_column("blocks")
    for heading in ("accuracy %", "FLOPs", "K/V", "prefill ×", "decode ×"):
        out.add_column(heading, justify="right")
    for x in lines:
        shares = f"{100 * x.accuracy:.1f}", f"{x.flops:.2f}", f"{x.kv_bytes:.2f}"
        out.add_row(x.recipe, x.blocks, *shares, f"{x.prefill:.2f}", f"{x.decode:.2f}")
    return out


def main() -> None:
    """Measure all recipes and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=500, help="number of questions")
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED, help="seed of scenes and questions")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=16, help="prompts at once, for speed")
    parser.add_argument("--repeat", type=int, default=5, help="rounds, for speed")
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="these recipes alone")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--json", type=Path, help="write the lines to this file")
    args = parser.parse_args()
    console = Console(stderr=True)
    torch.manual_seed(args.seed)
    model, processor = load(args.checkpoint)
    records = held_out_questions(args.n, args.seed)
    recipes = [r for name, r in shipped_recipes().items() if args.only is None or name in args.only]
    for recipe in (r for r in recipes if r.sets_processor):
        print(f"{recipe.name} is left out: this model's tower takes one size of pictures", file=sys.stderr)
    recipes = [r for r in recipes if not r.sets_processor]
    with console.status("speed") as status:
        prompts = dict(encode(processor, held_out_questions(args.prompts, args.seed)))
        found = bench(
            model, prompts, recipes, backend="eager", repeat=args.repeat, new_tokens=8, progress=status.update
        )
    speed = {row["name"]: (row["prefill_speedup"], row["decode_speedup"]) for row in found["rows"]}
    with console.status("unmodified"):
        given = answers(model, processor, records, args.batch)
    right = sum(a == r.answer for r, a in zip(records, given, strict=True)) / len(records)
    lines = [Line("unmodified", "", right, 1.0, 1.0, 1.0, 1.0)]
    for recipe in recipes:
        with console.status(recipe.name), vr.applied(model, recipe, backend="eager"):
            blocks = "untrained" if hasattr(model, ATTRIBUTE) else ""
            batch = 1 if any(getattr(p, "chain", ()) for p in recipe.passes) else args.batch
            lines.append(Line(recipe.name, blocks, *ask(model, processor, records, batch), *speed[recipe.name]))
    Console().print(table(lines, args.n, args.prompts))
    if args.json:
        result = {"questions": args.n, "seed": args.seed, "lines": [asdict(line) for line in lines]}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
