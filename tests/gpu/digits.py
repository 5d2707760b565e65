"""The digits model under generate(), rewritten, on a GPU by kernels and on the CPU by references: the same answers?

python -m tests.gpu.digits --json digits.json [-n 200] [--backend eager] [--dry]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

import vlmrewrite as vr
from examples.digits.model import CHECKPOINT, answers, load
from examples.digits.scenes import held_out_questions
from vlmrewrite.testing.triton.interpreter import trustworthy

RECIPES = ("stride-half", "sts-64", "visor-cross", "dape-half", "dpvr")


def main() -> int:
    """The exit status is 1 if an answer differs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    trustworthy()
    torch.set_num_threads(4)
    records = held_out_questions(5 if options.dry else options.n)
    here, processor = load(CHECKPOINT)
    there, _ = load(CHECKPOINT)
    there = there.to("cpu" if options.dry else "cuda")
    found, differing = [], 0
    for recipe in options.recipes[:2] if options.dry else options.recipes:
        with vr.applied(here, recipe, backend="eager", kernels="reference"):
            wanted = answers(here, processor, records)
        begun = time.perf_counter()
        with vr.applied(there, recipe, backend=options.backend, kernels="triton"):
            got = answers(there, processor, records)
            made = {
                name: sorted({x["kernel"] for x in of}) for name, of in vr.report(there).to_dict()["kernels"].items()
            }
        row = {
            "recipe": recipe,
            "questions": len(records),
            "differ": sum(a != b for a, b in zip(got, wanted, strict=True)),
            "right": [sum(a == r.answer for a, r in zip(x, records, strict=True)) for x in (wanted, got)],
            "seconds": time.perf_counter() - begun,
            "kernels": made,
        }
        differing += row["differ"]
        found.append(row)
        options.json.write_text(json.dumps({"backend": options.backend, "rows": found}, indent=1) + "\n")
        print({k: x for k, x in row.items() if k != "kernels"}, flush=True)
        print("  " + ", ".join(f"{name}: {' '.join(of)}" for name, of in made.items()), flush=True)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
