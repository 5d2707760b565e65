"""One task of the study: every method asked the same held-out questions, and what came out as plain values."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import vlmrewrite as vr
from vlmrewrite.evaluate import UNMODIFIED, Evaluation, paired, write_whole

from .methods import CONTROLS, Method
from .tasks import Task, encoded_once

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "backend": "eager"}


def ask(
    task: Task,
    model: Any,
    processor: Any,
    methods: Sequence[Method],
    n: int,
    output: Path,
    batch: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Ask ``n`` held-out questions, and write what came out to ``output``; a run that was cut off goes on.

    Args:
        task: of the study.
        model: unmodified.
        processor: its.
        methods: with the recipes, and those that have none.
        n: questions.
        output: folder that gets what :func:`vlmrewrite.evaluate` writes, and ``study.json``.
        batch: questions at a time.
        progress: called with the number of questions that are done, and of all.

    Returns:
        what is in ``study.json``: see :func:`summary`.
    """
    recipes = [method.recipe for method in methods if method.recipe is not None]
    with encoded_once(model):
        done = vr.evaluate(
            model,
            processor,
            task.held_out(n, task.seed),
            recipes,
            output=output,
            batch=batch,
            progress=progress,
            **OPTIONS,
        )
    found = summary(task, methods, done)
    write_whole(output / "study.json", json.dumps(found, indent=1) + "\n")
    return found


def summary(task: Task, methods: Sequence[Method], done: Evaluation) -> dict[str, Any]:
    """The rows of an evaluation with what each is in the study, and paired with the controls at its share.

    ``rows`` are those of :class:`vlmrewrite.evaluate.results.Row` with ``technique``, ``share``, ``blocks`` and
    ``versus``: for each control at the same share, difference (row less control) and its 95 % interval. ``absent`` are
    the methods that have no row, with the reason.
    """
    by_name = {_name(method): method for method in methods if method.recipe is not None}
    failed = {line["id"] for line in done.failures}
    scores: dict[str, list[float]] = {row.recipe: [] for row in done.rows}
    for line in done.samples:
        if line["id"] not in failed:
            scores[line["recipe"]].append(line["score"])
    rows = []
    for row in done.rows:
        method = by_name.get(row.recipe, Method(UNMODIFIED, "1"))
        versus = {}
        for control in CONTROLS:
            other = Method(control, method.share).name
            if other in scores and other != row.recipe:
                found = paired(scores[other], scores[row.recipe])
                versus[control] = {"difference": found.difference, "interval": found.interval}
        told = {"technique": method.technique, "share": method.share, "blocks": method.blocks}
        rows.append(told | {"versus": versus} | asdict(row))
    absent = [
        {"technique": m.technique, "share": m.share, "blocks": m.blocks, "reason": m.reason}
        for m in methods
        if m.recipe is None
    ]
    plain: dict[str, Any] = json.loads(
        json.dumps(
            {
                "task": task.name,
                "about": task.about,
                "n": done.rows[0].n,
                "seed": task.seed,
                "kinds": task.kinds,
                "rows": rows,
                "absent": absent,
                "failures": len(done.failures),
                "settings": done.about,
            }
        )
    )
    return plain


def _name(method: Method) -> str:
    """The name of the row: that of the recipe, or of the folder with the blocks."""
    return method.recipe.name if isinstance(method.recipe, Path) else method.name
