"""What pruning costs: accuracy, FLOPs and K/V bytes of the digits model under three ways to drop vision tokens.

    python -m examples.digits.evaluate                       # from the root of the repository: 500 held-out questions
    python -m examples.digits.evaluate -n 100 --json out.json

Every method keeps 1/2, 1/4 and 1/8 of the 144 vision tokens, averaged over the decoder layers: STS keeps one and a
half times that share in the first half of the layers and half of it in the second, Random and Stride keep that share in
all layers. Each question is one prompt, answered by greedy ``generate()`` in fp32; an answer counts only if it is the
one right word followed by the end of the text.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import vlmrewrite as vr
from vlmrewrite.passes import STS, Random, Stride

from .model import CHECKPOINT, answers, load
from .questions import KINDS
from .scenes import EVALUATION_SEED, HeldOut, held_out_questions

SHARES = {"1/2": 1 / 2, "1/4": 1 / 4, "1/8": 1 / 8}
ADDING_UP = ("count", "total")  # questions that need every digit of the scene


@dataclass(frozen=True)
class Row:
    """One line of the table; accuracies and ratios are shares, ``None`` where no such question was asked."""

    method: str
    kept: str
    accuracy: float | None
    adding_up: float | None
    rest: float | None
    flops: float
    kv_bytes: float
    kinds: dict[str, float]


def methods() -> list[tuple[str, str, list[Any]]]:
    """(name, share as text, passes) of every pruned model in the table."""
    out: list[tuple[str, str, list[Any]]] = []
    for text, share in SHARES.items():
        out.append(("STS", text, [STS(keep=1.5 * share, refine=0.5 * share, at=0.5)]))
        out.append(("Random", text, [Random(keep=share, at=0)]))
        out.append(("Stride", text, [Stride(keep=share, at=0)]))
    return out


def accuracy(records: Sequence[HeldOut], given: Sequence[str], kinds: Sequence[str]) -> float | None:
    """Share of right answers to questions of these kinds."""
    right = [a == r.answer for r, a in zip(records, given, strict=True) if r.kind in kinds]
    return sum(right) / len(right) if right else None


def measure(
    name: str,
    kept: str,
    model: Any,
    processor: Any,
    records: Sequence[HeldOut],
    batch: int,
) -> Row:
    """Ask all questions; FLOPs and K/V bytes are relative to the unmodified model."""
    given = answers(model, processor, records, batch)
    flops = kv_bytes = 1.0
    if name != "unmodified":
        totals = vr.report(model).to_dict()["totals"]
        flops, kv_bytes = (totals["after"][key] / totals["before"][key] for key in ("flops", "kv_bytes"))
    rest = [kind for kind in KINDS if kind not in ADDING_UP]
    by_kind = {kind: accuracy(records, given, [kind]) for kind in KINDS}
    return Row(
        name,
        kept,
        accuracy(records, given, KINDS),
        accuracy(records, given, ADDING_UP),
        accuracy(records, given, rest),
        flops,
        kv_bytes,
        {kind: share for kind, share in by_kind.items() if share is not None},
    )


def table(rows: Sequence[Row], records: Sequence[HeldOut]) -> Table:
    """The rows as text; the three accuracies are percentages."""
    asked = Counter(r.kind for r in records)
    adding_up = sum(asked[kind] for kind in ADDING_UP)
    out = Table(title=f"{len(records)} held-out questions, greedy generate(), fp32")
    out.add_column("method")
    out.add_column("kept", justify="right")
    for heading in (f"all ({len(records)})", f"count+total ({adding_up})", f"rest ({len(records) - adding_up})"):
        out.add_column(heading + " %", justify="right")
    out.add_column("FLOPs", justify="right")
    out.add_column("K/V", justify="right")
    for row in rows:
        shares = ("-" if x is None else f"{100 * x:.1f}" for x in (row.accuracy, row.adding_up, row.rest))
        out.add_row(row.method, row.kept, *shares, f"{row.flops:.2f}", f"{row.kv_bytes:.2f}")
        if row.method in ("unmodified", "Stride"):
            out.add_section()
    return out


def main() -> None:
    """Measure all methods and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=500, help="number of questions")
    parser.add_argument("--seed", type=int, default=EVALUATION_SEED, help="seed of scenes and questions")
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--json", type=Path, help="write the rows to this file, with accuracy per kind of question")
    args = parser.parse_args()
    console = Console(stderr=True)
    torch.manual_seed(args.seed)
    model, processor = load(args.checkpoint)
    records = held_out_questions(args.n, args.seed)
    with console.status("unmodified"):
        rows = [measure("unmodified", "1", model, processor, records, args.batch)]
    for name, kept, passes in methods():
        with console.status(f"{name} {kept}"), vr.applied(model, passes, strict=True):
            rows.append(measure(name, kept, model, processor, records, args.batch))
    Console().print(table(rows, records))
    if args.json:
        result = {"questions": args.n, "seed": args.seed, "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
