"""Families of models on a GPU, rewritten, by kernels and compiled: each judged by the oracle.

python -m tests.gpu.families --json families.json [--part 0/6] [--seconds 100] [--dry]
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import traceback
from pathlib import Path

import torch

from tests.kernels.test_end_to_end import EACH, ROWS
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import ZOO
from vlmrewrite.testing.triton.interpreter import trustworthy

NAMES = (
    "llava", "qwen2_5_vl", "gemma3", "llava_qwen2", "internvl", "smolvlm", "llava_next", "qwen3_vl", "gemma4",
    "mistral3", "idefics3", "qwen3_5", "deepseek_vl", "llama4", "glm4v", "minimax_m3_vl",
)  # fmt: skip
WAYS = [(torch.float32, "eager"), (torch.bfloat16, "eager"), (torch.float32, "inductor")]


def main() -> int:
    """The exit status is 1 if the oracle says no."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--ways", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--names", nargs="+", default=list(NAMES))
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    trustworthy()
    torch.set_num_threads(1)
    part, parts = map(int, options.part.split("/"))
    names = options.names[part::parts]
    begun, found = time.monotonic(), []
    cells = itertools.product(options.ways, EACH.items())
    for (way, (recipe, passes)), name in itertools.product(cells, names[:2] if options.dry else names):
        if time.monotonic() - begun > options.seconds:
            break
        dtype, backend = WAYS[way]
        made = ZOO[name]()
        made.model.to("cpu" if options.dry else "cuda", dtype)
        inputs = {k: x.to(dtype) if torch.is_floating_point(x) else x for k, x in made.inputs(ROWS).items()}
        cell = {"family": name, "recipe": recipe, "dtype": str(dtype), "backend": backend}
        try:
            judge = forward_agreement if dtype != torch.float32 else generation_agreement
            seen = judge(made.model, inputs, passes, backend=backend, kernels="triton")
            cell |= {"error": seen.error, "tolerance": seen.tolerance}
            seen.check()
        except Exception as e:
            last = traceback.extract_tb(e.__traceback__)[-1]
            cell["failed"] = f"{type(e).__name__}: {' '.join(str(e).split())[:400]} ({last.filename}:{last.lineno})"
        found.append(cell)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        if "failed" in cell:
            print(cell, flush=True)
    failed = sum("failed" in cell for cell in found)
    print(f"part {part}: {len(found)} cells in {time.monotonic() - begun:.0f} s, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
