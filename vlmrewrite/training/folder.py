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

_STATE = "trainer_state.json"

_CARD = """
## Training

| | |
|---|---|
{rows}

`{about}` holds the settings and every loss that was logged.
"""


_HASHED = {"data": "the data", "weights": "the base model's weights", "start": "the numbers that blocks start from"}
"""What hashes in ``about`` are of."""


def check_folder(folder: Path, *, resume: bool) -> None:
    """See that a run may use a folder, or that one in it may go on; nothing is written.

    Raises:
        ValueError: it holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, or nothing, got a file")
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if resume and ABOUT not in there:
        raise ValueError(f"{folder}: holds no run to go on with: leave --resume out, or give the --output of a run")
    if not there:
        return
    if ABOUT not in there:
        raise ValueError(f"{folder}: expected an empty folder, or one of a run with {ABOUT}, got one with {there[0]}")
    if not resume:
        raise ValueError(f"{folder}: holds a run already: give another --output folder, or go on with it by --resume")


def refuse_other_run(folder: Path, about: dict[str, Any]) -> None:
    """Raise ValueError if a folder holds a run of something else; nothing is written.

    Args:
        folder: of a run.
        about: plain values that say what the run is of.
    """
    try:
        before = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["run"]
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{folder / ABOUT}: expected JSON with a 'run': {e}") from None
    about = json.loads(json.dumps(about))
    if other := [key for key in about if before.get(key) != about[key]]:
        plain = [key for key in other if key not in _HASHED]
        said = "; ".join(f"{key}: {shown(before.get(key))}, now {shown(about[key])}" for key in plain)
        raise ValueError(
            f"{folder}: holds a run that differs in {', '.join(_HASHED.get(key, key) for key in other)}: give another"
            f" --output folder, or the same again{f' ({said})' if said else ''}"
        )


def latest_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint of a run, or None."""
    found = (folder / CHECKPOINTS).glob("checkpoint-*")
    steps = {int(m[1]): p for p in found if (m := re.fullmatch(r"checkpoint-(\d+)", p.name)) and whole(p)}
    return steps[max(steps)] if steps else None


def state_of(checkpoint: Path) -> tuple[int, list[dict[str, Any]]]:
    """The steps that were made, and what was logged."""
    state = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
    return state["global_step"], state["log_history"]


def whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end: the state of the trainer is the last file."""
    return (checkpoint / _STATE).is_file()


def write_about(folder: Path, about: dict[str, Any], log: list[dict[str, Any]], steps: int) -> None:
    """Write what a run is of, how far it is, and what was logged."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"run": about, "steps": steps, "log": log}, indent=1, allow_nan=False)
    write_whole(folder / ABOUT, text + "\n")


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
