"""A small vision-language model with half of its vision tokens: the same questions, asked twice.

    python examples/demo.py                         # writes demo.png
    python examples/demo.py --seed 7 --recipe stride-half --image scene.png

Draws a scene of held-out scanned digits, asks the model of ``examples/digits`` some questions about it, applies the
recipe in place, asks again, and draws which vision tokens each stage of the decoder has worked on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from digits.model import CHECKPOINT, answers, encode, load
from digits.questions import IMAGE
from digits.scenes import GRID, PATCH, VISION_TOKENS, HeldOut, held_out_questions
from PIL import Image
from rich.console import Console
from rich.table import Table

import vlmrewrite as vr

matplotlib.use("Agg")  # needs no screen
import matplotlib.pyplot as plt

DIMMED = 0.15  # brightness of a dropped patch
GAMMA = 0.6  # below 1 lightens the dark backgrounds, so that kept and dropped patches differ to the eye


def scene_questions(n: int, seed: int) -> list[HeldOut]:
    """``n`` questions of different kinds about one scene."""
    kinds: dict[str, HeldOut] = {}
    for record in held_out_questions(200, seed, per_scene=200):
        kinds.setdefault(record.kind, record)
    return list(kinds.values())[:n]


def ranges(layers: Sequence[int]) -> str:
    """(0, 1, 2, 5) -> "layers 0-2, 5"."""
    runs = [[i for _, i in run] for _, run in groupby(enumerate(sorted(layers)), lambda pair: pair[1] - pair[0])]
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    return f"layer{'s' if len(layers) > 1 else ''} {text}"


def answer_table(records: Sequence[HeldOut], before: Sequence[str], after: Sequence[str], recipe: str) -> Table:
    """Question, truth and both answers; wrong answers in red."""
    table = Table(title="held-out scene, one prompt a question")
    for heading in ("question", "truth", "unmodified", recipe):
        table.add_column(heading)
    for record, *given in zip(records, before, after, strict=True):
        marked = (f"[{'green' if text == record.answer else 'red'}]{text}[/]" for text in given)
        table.add_row(record.question, record.answer, *marked)
    return table


def draw(image: Image.Image, panels: Sequence[tuple[str, torch.Tensor]], path: Path) -> None:
    """Draw the picture, then for each panel (title, kept bool [144]) the picture with dropped patches dimmed."""
    pixels = (np.asarray(image).astype(np.float32) / 255) ** GAMMA
    figure, axes = plt.subplots(1, 1 + len(panels), figsize=(3.2 * (1 + len(panels)), 3.6), squeeze=False)
    for axis, (title, kept) in zip(axes[0], [("picture", None), *panels], strict=True):
        shown = pixels
        if kept is not None:
            light = np.where(kept.reshape(GRID, GRID).numpy(), 1.0, DIMMED)
            shown = pixels * light.repeat(PATCH, 0).repeat(PATCH, 1)[..., None]
        axis.imshow(shown, interpolation="nearest", extent=(0, GRID, GRID, 0))
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(GRID + 1), labels=[])
        axis.set_yticks(range(GRID + 1), labels=[])
        axis.grid(color="white", alpha=0.12, linewidth=0.5)
        axis.tick_params(length=0)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def kept_patches(model: Any, input_ids: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """For each stage of the last prefill its title and, for the first row, the kept image tokens, bool [144]."""
    image = input_ids[0] == IMAGE
    panels = []
    for stage in vr.kept_tokens(model):
        kept = stage.vision[0].cpu()[image]
        panels.append((f"{ranges(stage.layers)}: {int(kept.sum())} of {VISION_TOKENS} tokens", kept))
    return panels


def main() -> None:
    """Ask, apply, ask again, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="sts-half", help="a shipped recipe or a recipe file")
    parser.add_argument("--seed", type=int, default=4, help="which scene")
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--image", type=Path, default=Path("demo.png"), help="where to write the picture")
    args = parser.parse_args()

    model, processor = load(args.checkpoint)
    records = scene_questions(args.questions, args.seed)
    before = answers(model, processor, records)
    with vr.applied(model, args.recipe):
        after = answers(model, processor, records)
        report = vr.report(model)
        panels = kept_patches(model, encode(processor, records)["input_ids"])

    console = Console()
    console.print(answer_table(records, before, after, args.recipe))
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    draw(records[0].image, panels, args.image)
    console.print(f"kept vision tokens: {args.image}", markup=False)


if __name__ == "__main__":
    main()
