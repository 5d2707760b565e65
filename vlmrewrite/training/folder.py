"""The folder of a run: what it is of, its checkpoints and logs, and at the end the blocks with a card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from vlmrewrite.checkpoint import save_blocks
from vlmrewrite.errors import shown
from vlmrewrite.evaluate import write_whole
from vlmrewrite.saving import card, stored_of

ABOUT, CHECKPOINTS, LOGS, CARD = "training.json", "checkpoints", "logs", "README.md"

_CARD = """
## Training

| | |
|---|---|
{rows}

`{about}` holds the settings and every loss that was logged.
"""


def opened(folder: Path, about: dict[str, Any], *, resume: bool) -> None:
    """See that a run may use a folder; nothing is written.

    Args:
        folder: that is not there, is empty, or, to resume, holds the same run.
        about: plain values that say what the run is of.
        resume: whether a run in it is to go on.

    Raises:
        ValueError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, or nothing, got a file")
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if not there:
        return
    if ABOUT not in there:
        raise ValueError(f"{folder}: expected an empty folder, or one of a run with {ABOUT}, got one with {there[0]}")
    if not resume:
        raise ValueError(f"{folder}: holds a run already: give another --output folder, or go on with it by --resume")
    try:
        before = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["run"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{folder / ABOUT}: expected JSON with a 'run': {e}") from None
    about = json.loads(json.dumps(about))
    if other := [key for key in about if before.get(key) != about[key]]:
        said = "; ".join(f"{key}: {shown(before.get(key))}, now {shown(about[key])}" for key in other)
        raise ValueError(
            f"{folder}: holds a run that differs in {', '.join(other)}: give another --output folder, or the same"
            f" options ({said})"
        )


def latest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run, or None."""
    found = (folder / CHECKPOINTS).glob("checkpoint-*")
    steps = {int(m[1]): p for p in found if (m := re.fullmatch(r"checkpoint-(\d+)", p.name)) and whole(p)}
    return steps[max(steps)] if steps else None


def whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the state of the trainer is the last file."""
    return (checkpoint / "trainer_state.json").is_file()


def write_about(folder: Path, about: dict[str, Any], log: list[dict[str, Any]], steps: int) -> None:
    """Write what a run is of, how far it is, and what was logged."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / ABOUT, json.dumps({"run": about, "steps": steps, "log": log}, indent=1) + "\n")


def write_blocks(folder: Path, model: nn.Module, facts: dict[str, Any]) -> None:
    """Write the recipe, its blocks and a card about both.

    Args:
        folder: of the run.
        model: rewritten.
        facts: rows of the card's table.
    """
    save_blocks(model, folder)
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    text = str(card(stored_of(model), folder.resolve().name)) + _CARD.format(rows=rows, about=ABOUT)
    write_whole(folder / CARD, text)
