"""VISOR's thirteen configurations and STS's three schedules, as the papers have them, on the small models.

    python -m examples.digits.study.configurations --task digits -n 1000 --output configurations-out

The paper (arXiv 2603.23495) counts self layers from 1: 1, 4, 7, ... 22 of 24; here each stands at the same depth of the
decoder, and all other layers read vision tokens (cross layers are always on, and with them the model's own weights do
without new modules). Configurations that are the same at this depth are asked once. STS's schedules are for 576 vision
tokens, and asked of the documents alone. Nothing is trained.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from rich.console import Console

import vlmrewrite as vr
from vlmrewrite.evaluate import write_whole
from vlmrewrite.passes import VISOR
from vlmrewrite.recipe import shipped_recipes

from .methods import Method
from .run import ask, kept
from .tasks import task_of

LAYERS = 24
CONFIGURATIONS = (
    (1, 4), (1, 7), (1, 4, 7), (1, 4, 16), (1, 7, 16), (1, 10, 16), (1, 4, 7, 16), (1, 4, 7, 22), (1, 4, 10, 16),
    (1, 4, 7, 10, 16), (1, 4, 7, 16, 22), (1, 4, 7, 10, 16, 22), (1, 4, 7, 10, 16, 19, 22),
)  # fmt: skip
"""Self layers, counted from 1."""


def at_depth(layers: tuple[int, ...], depth: int) -> tuple[int, ...]:
    """The same places in a decoder of another depth, counted from 0."""
    return tuple(sorted({(layer - 1) * depth // LAYERS for layer in layers}))


def methods(depth: int, schedules: bool = False) -> list[Method]:
    """A row for each configuration, one without self layers, one without the first; and with STS's ``schedules``."""
    found = dict[tuple[int, ...], str]()
    for layers in (*CONFIGURATIONS, (), (4, 7, 10, 16, 19, 22)):
        own = at_depth(layers, depth)
        told = " ".join(map(str, layers)) or "none"
        found[own] = f"{found[own]} = {told}" if own in found else told
    out = []
    for own, told in found.items():
        cross = tuple(i for i in range(depth) if i not in own)
        recipe = vr.Recipe(name=f"self {told}", passes=(VISOR(self_layers=own, cross_layers=cross),))
        out.append(Method(recipe.name, "", recipe=recipe))
    if schedules:
        out += [Method(name, "", recipe=shipped_recipes()[name]) for name in ("sts-128", "sts-64", "sts-32")]
    return out


def main() -> None:
    """Ask, and write ``TASK-configurations.json`` and ``.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["digits", "documents"], default="digits")
    parser.add_argument("-n", type=int, default=1000, help="held-out questions")
    parser.add_argument("--output", type=Path, default=Path("configurations-out"))
    parser.add_argument("--batch", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = task_of(args.task)
    model, processor = task.load()
    rows = methods(model.config.text_config.num_hidden_layers, args.task == "documents")
    console = Console(stderr=True)
    with console.status(args.task) as status:
        found = ask(task, model, processor, rows, args.n, args.output / args.task, args.batch, status.update)
    kept(found, args.output / f"{args.task}-configurations.json")
    lines = ["| recipe | accuracy % | to unmodified | FLOPs |", "|---|---|---|---|"]
    for row in found["rows"]:
        low, high = row["difference_interval"]
        moved = (
            ""
            if row["recipe"] == "unmodified"
            else f"{100 * row['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        )
        lines.append(f"| {row['recipe']} | {100 * row['accuracy']:.1f} | {moved} | {row['flops']:.2f} |")
    write_whole(args.output / f"{args.task}-configurations.md", "\n".join(lines) + "\n")
    console.print(f"{args.output / args.task}-configurations.md: {found['n']} questions")


if __name__ == "__main__":
    main()
