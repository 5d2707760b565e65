"""Blocks of the study that are trained: what they are of, and how long."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import vlmrewrite as vr
from vlmrewrite.passes import DAPE, VISOR

from .methods import Method
from .tasks import Task

FOLDERS = {"dpvr-half": "1/2", "dape-quarter": "1/4", "visor-quarter": "1/4"}
"""Folder of the blocks -> the share of the FLOPs that they belong to."""

CHAIN: list[dict[str, Any]] = [
    {"cross_layers": 0.3333},
    {"self_layers": [0], "cross_layers": 1.0},
    {"self_layers": 1.0},
]
ENOUGH = 0.95
SAMPLES = 8000
HOW: dict[str, dict[str, Any]] = {
    "dpvr-half": {"steps": 300, "batch": 32, "lr": 1e-3},
    "dape-quarter": {"steps": 150, "batch": 16, "lr": 1e-3},
    "visor-quarter": {"steps": 150, "batch": 32, "lr": 3e-3},
}


def recipe_of(name: str, methods: Sequence[Method]) -> vr.Recipe:
    """The recipe whose blocks are trained: that of the untrained row, DAPE with a match that learns; VISOR's router."""
    technique, share = name.partition("-")[0], FOLDERS[name]
    if technique == "visor":
        passes: Any = (VISOR(policy="router", chain=CHAIN, enough=ENOUGH),)
    else:
        [passes] = [m.recipe.passes for m in methods if m.technique == technique and m.share == share and m.recipe]
    if technique == "dape":
        passes = tuple(dataclasses.replace(p, matching="learned") if isinstance(p, DAPE) else p for p in passes)
    return vr.Recipe(name=name, passes=passes)


def train(task: Task, model: Any, processor: Any, methods: Sequence[Method], folder: Path, **how: Any) -> None:
    """Train what ``folder`` lacks; a run that was cut off goes on.

    Args:
        task: gives questions to learn from.
        model: unmodified.
        processor: its.
        methods: rows of the study, the untrained ones among them.
        folder: gets a folder for each of ``FOLDERS``.
        how: for :func:`vlmrewrite.train`, in place of what ``HOW`` says.
    """
    for i, name in enumerate(FOLDERS):
        if (folder / name / "training.json").is_file():
            continue
        settings = HOW[name] | how
        rows = task.learn(min(SAMPLES, settings["steps"] * settings["batch"]), 100 + i)
        run = folder / name
        vr.train(
            model,
            processor,
            rows,
            recipe_of(name, methods),
            output=run,
            resume=run.exists(),
            save_every=50,
            progress=False,
            data_name=f"{len(rows)} questions of {task.name}",
            **settings,
        )
