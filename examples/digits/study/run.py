"""One task of the study: every method asked the same held-out questions, and what came out as plain values."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import vlmrewrite as vr
from vlmrewrite.evaluate import UNMODIFIED, Sample, paired, read_data, rows_of, write_whole

from .methods import CONTROLS, Method
from .tasks import Task, encoded_once

OPTIONS: dict[str, Any] = {"max_new_tokens": 4, "backend": "eager"}
PART = 250
"""Questions of a run of ``vlmrewrite.evaluate``: parts that are done are kept where more questions are asked for."""


def ask(
    task: Task,
    model: Any,
    processor: Any,
    methods: Sequence[Method],
    n: int,
    output: Path,
    batch: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Ask ``n`` held-out questions; what is done in ``output`` is not done again.

    Args:
        task: of the study.
        model: unmodified.
        processor: its.
        methods: with the recipes, and those that have none.
        n: questions, in parts of ``PART``.
        output: folder that gets, for each part, and for trained blocks apart, what ``vlmrewrite.evaluate`` writes.
        batch: questions at a time.
        progress: called with what is being done.

    Returns:
        see :func:`summary`.
    """
    groups = {"untrained": [m for m in methods if m.blocks != "trained"]}
    groups["trained"] = [m for m in methods if m.blocks == "trained"]
    samples, lines, batches = list[Sample](), list[dict[str, Any]](), list[dict[str, Any]]()
    about: dict[str, Any] = {}
    for part, start in enumerate(range(0, n, PART)):
        rows = [row | {"id": start + i} for i, row in enumerate(task.held_out(min(PART, n - start), task.seed + part))]
        samples += read_data(rows)
        for name, group in groups.items():
            recipes = [method.recipe for method in group if method.recipe is not None]
            if not recipes:
                continue
            folder = output / f"{name}-{start}-{start + len(rows)}"
            with encoded_once(model):
                done = vr.evaluate(
                    model,
                    processor,
                    rows,
                    recipes,
                    output=folder,
                    batch=batch,
                    progress=lambda i, all_, name=name, start=start: progress(f"{name}: question {start + i} of {n}"),  # type: ignore[misc]
                    **OPTIONS,
                )
            lines += done.samples
            batches += [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
            about |= done.about
    return summary(task, methods, samples, lines, batches, about)


def summary(
    task: Task,
    methods: Sequence[Method],
    asked: Sequence[Sample],
    lines: Sequence[dict[str, Any]],
    batches: Sequence[dict[str, Any]],
    about: dict[str, Any],
) -> dict[str, Any]:
    """The rows of an evaluation with what each is in the study, and paired with the controls at its share.

    ``rows`` are those of :class:`vlmrewrite.evaluate.results.Row` with ``technique``, ``share``, ``blocks``, ``passes``
    and ``versus``: for each control at the same share, difference (row less control) and its 95 % interval. ``absent``
    are the methods that have no row, with the reason.
    """
    by_name = {_name(method): method for method in methods if method.recipe is not None}
    rows = rows_of([UNMODIFIED, *by_name], asked, lines, batches, 0)
    scores: dict[str, dict[Any, float | None]] = {name: {} for name in (UNMODIFIED, *by_name)}
    for line in lines:
        scores[line["recipe"]][line["id"]] = line["score"]
    whole = [x.id for x in asked if all(found[x.id] is not None for found in scores.values())]
    out = []
    for row in rows:
        method = by_name.get(row.recipe, Method(UNMODIFIED, "1"))
        versus = {}
        for control in CONTROLS:
            other = Method(control, method.share).name
            if other in scores and other != row.recipe:
                before, after = ([scores[name][i] or 0.0 for i in whole] for name in (other, row.recipe))
                found = paired(before, after)
                versus[control] = {"difference": found.difference, "interval": found.interval}
        told = {"technique": method.technique, "share": method.share, "blocks": method.blocks}
        recipe = method.recipe if isinstance(method.recipe, vr.Recipe) else None
        out.append(told | {"passes": repr(recipe.passes) if recipe else "", "versus": versus} | asdict(row))
    absent = [
        {"technique": m.technique, "share": m.share, "blocks": m.blocks, "reason": m.reason}
        for m in methods
        if m.recipe is None
    ]
    plain: dict[str, Any] = {
        "task": task.name,
        "about": task.about,
        "n": len(whole),
        "seed": task.seed,
        "kinds": task.kinds,
    }
    plain |= {"rows": out, "absent": absent, "failures": len(asked) - len(whole)}
    plain["settings"] = {key: about[key] for key in ("device", "torch", "batch") if key in about}
    listed: dict[str, Any] = json.loads(json.dumps(plain))
    return listed


def _name(method: Method) -> str:
    """The name of the row: that of the recipe, or of the folder with the blocks."""
    return method.recipe.name if isinstance(method.recipe, Path) else method.name


def kept(found: dict[str, Any], path: Path) -> None:
    """Write what :func:`summary` gave as JSON."""
    write_whole(path, json.dumps(found, indent=1) + "\n")
