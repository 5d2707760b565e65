"""The tables of ``docs/performance.md`` from a file that ``python -m benchmarks.run`` wrote, in Markdown."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.compare import read


def table(run: dict[str, Any]) -> str:
    """One setting: each recipe's prefill and decoding, against the unmodified model and the native loop."""
    plain, *rows = run["rows"]
    lines = [
        f"### {run['model']}, {run['prompt']}",
        "",
        (
            f"Unmodified: prefill {plain['prefill_median'] * 1e3:.4g} ms, decoding"
            f" {plain['decode_median'] * 1e3:.4g} ms a token. Rounds: {run['repeat']}."
        ),
        "",
        "| recipe | prefill | of FLOP ratio | of native | decode | of native | K/V |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["passes_refused"]:
            lines.append(f"| `{row['name']}` | refused here | | | | | |")
            continue
        loop, least = row["native"], row["flop_ratio"]
        native = [f"{loop[f'{p}_efficiency']:.2f}" if "refused" not in loop else "none" for p in ("prefill", "decode")]
        lines.append(
            f"| `{row['name']}` | × {row['prefill_speedup']:.2f} | {row['prefill_speedup'] / least:.2f} | {native[0]}"
            f" | × {row['decode_speedup']:.2f} | {native[1]} | ÷ {row['kv_ratio']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print("\n\n".join(table(run) for path in sys.argv[1:] for run in read(Path(path))))
