"""`vlmrewrite bench --kernels` in parts, each written as soon as it is there, until time is up.

python -m tests.gpu.kernels --json kernels.json --seconds 100 [--against library] [--dry]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from vlmrewrite.bench.kernels.harness import FAMILIES, bench_kernels


def main() -> int:
    """Sizes and batches in the order of their worth."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=100.0)
    parser.add_argument("--against", nargs="*", default=["library"])
    parser.add_argument("--sizes", nargs="+", default=["llava-1.5", "qwen2.5-vl"])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    device = torch.device("cpu" if options.dry else "cuda")
    sizes = ["tiny"] if options.dry else options.sizes
    parts = [(size, batch, family) for size in sizes for batch in options.batches for family in options.families]
    begun, found, left = time.monotonic(), {}, []
    for size, batch, family in parts:
        if time.monotonic() - begun > options.seconds:
            left.append(f"{family} {size} batch {batch}")
            continue
        part = bench_kernels(
            device, sizes=[size], batches=[batch], families=[family], against=options.against, repeat=options.repeat
        )
        found = {
            **part,
            "ceiling": found.get("ceiling", part["ceiling"]),
            "rows": [*found.get("rows", []), *part["rows"]],
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")
        for row in part["rows"]:
            times = {name: round(x, 4) for name, x in row.get("milliseconds", {}).items()}
            shares = {name: round(row[name], 3) for name in ("of_copy", "of_matmul") if name in row}
            error = {name: f"{x:.1e}" for name, x in row.get("error", {}).items()}
            told = [family, row["case"], size, batch, times, shares, error, row.get("skipped") or ""]
            print(f"{time.monotonic() - begun:6.1f}", *told, flush=True)
    print("left out:", ", ".join(left) or "nothing", "ceilings", found.get("ceiling"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
