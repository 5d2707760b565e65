"""Search a recipe for a model, data and a budget."""

from __future__ import annotations

import importlib
import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import transformers

from vlmrewrite.evaluate import (
    FEW,
    Evaluation,
    Metric,
    Row,
    Sample,
    cost_of,
    encode,
    evaluate,
    fingerprint,
    identity_of,
    metric_of,
    read_data,
    refuse_chats,
)
from vlmrewrite.hf import base_model_of
from vlmrewrite.ops import Backend, Kernels, choose, resolve
from vlmrewrite.recipe import Recipe
from vlmrewrite.tune.checks import check_wish
from vlmrewrite.tune.files import write
from vlmrewrite.tune.judge import best, cheap, doubts, taken, verdict, with_front
from vlmrewrite.tune.pictures import smaller_pictures
from vlmrewrite.tune.prompts import Prompts
from vlmrewrite.tune.results import Point, Tuned
from vlmrewrite.tune.search import FINALISTS, PROFILED, Candidate, batches_of, optuna, search
from vlmrewrite.tune.space import Shape, Solved, Space, solve
from vlmrewrite.tune.split import split
from vlmrewrite.tune.wish import KINDS, Wish

_OTHER = (0.5, 0.7, 1.4, 2.0)
"""Budgets, as multiples of the one that is wished for, for which the best kinds of recipes are solved too."""

_KINDS = 2

Progress = Callable[[str, int, int], None]


def tune(
    model: Any,
    processor: Any,
    data: Any,
    budget: str | Mapping[str, float],
    max_drop: float | str | None = 0.01,
    *,
    metric: str | Metric = "auto",
    output: str | os.PathLike[str] | None = None,
    trials: int = 200,
    held_out: float = 0.5,
    seed: int = 0,
    batch: int = 8,
    max_new_tokens: int = 32,
    backend: Backend = "auto",
    kernels: Kernels = "auto",
    progress: Progress = lambda stage, done, total: None,
) -> Tuned:
    """Search the recipe that loses least within a budget, and judge it on samples that the search did not see.

    Which passes, their budgets and layers are searched; see docs/tune.md. What costs too much is never run: FLOPs and
    K/V bytes follow from the plan. Candidates are compared with the unmodified model by the KL of the first token, on
    more and more prompts; the best of them answer the searched samples, for the metric. On the held-out samples, the
    best is compared with controls of equal cost, and one that scores as much is taken in its place. Whether the wish is
    met goes by costs and scores on these.

    Args:
        model: an unmodified model in eval mode, on any device.
        processor: its, with a tokenizer and an image processor.
        data: as for :func:`vlmrewrite.evaluate`.
        budget: ``{"flops": 0.3}`` or ``"flops=0.3"``: the share of the unmodified model's cost, above 0 and below 1;
            ``flops`` and ``kv`` of the prefill's decoder, ``latency`` of its seconds. Latency goes by FLOPs in the
            search and is measured then.
        max_drop: how much lower than the unmodified model's the mean score may be: 0.01 or ``"1%"``; None or ``"any"``:
            no bound.
        metric: as for :func:`vlmrewrite.evaluate`.
        output: path of a YAML file that gets the recipe; beside it, with the same name, what was found as JSON and as
            an HTML page. If nothing meets the wish, these two alone.
        trials: recipes that are drawn.
        held_out: share of the samples that judge, about; samples about the same pictures are on one side.
        seed: of all that is drawn.
        batch: prompts at a time.
        max_new_tokens: of the longest answer.
        backend, kernels: for :func:`vlmrewrite.apply`.
        progress: called with what is done, and how many of how many steps of that.

    Raises:
        ValueError: an argument cannot be used, or no recipe can meet the budget; or another file of the recipe's name
            came to be in the meantime. Nothing is written.
        ImportError: Optuna is not installed.
        RuntimeError: all samples failed; see :func:`vlmrewrite.evaluate`.
    """
    counts = {"trials": trials, "batch": batch, "max_new_tokens": max_new_tokens}
    wish, path = check_wish(budget, max_drop, output, metric=metric, held_out=held_out, seed=seed, **counts)
    samples = read_data(data)
    metric_of(metric, samples)
    refuse_chats(processor, samples)
    base = base_model_of(model)
    if base.training:
        raise ValueError(f"expected a {type(base).__name__} in eval mode, got one in training: call model.eval()")
    if len(samples) < FEW:
        warnings.warn(f"{len(samples)} samples: intervals are wide below {FEW}", stacklevel=2)
    searched, rest = split(samples, held_out, seed)
    count = -(-len(searched) // batch)
    prompts = Prompts(base, _inputs(base, processor, searched, batch), lambda i: progress("prompts", i, count))
    space, found, failed = candidates(prompts, wish, trials, seed, progress)
    asking: dict[str, Any] = {"metric": metric, "batch": batch, "max_new_tokens": max_new_tokens, "seed": seed}
    asking |= {"backend": backend, "kernels": kernels}

    def asked(stage: str, some: Sequence[Sample], recipes: Sequence[Recipe]) -> Evaluation:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* samples: intervals are wide", UserWarning)
            return evaluate(model, processor, some, recipes, progress=lambda i, n: progress(stage, i, n), **asking)

    chosen = [(_recipe(c.solved, str(c.number)), c.solved) for c in found[:FINALISTS]]
    others = [
        (_recipe(x, f"at {x.shares[wish.counted]:.3f}, {i}"), x) for i, x in enumerate(_elsewhere(found, prompts, wish))
    ]
    done = asked("answers", searched, [recipe for recipe, _ in [*chosen, *others]])
    points = _points(done, [*chosen, *others])
    mine = _winner(done, points, [recipe.name for recipe, _ in chosen], wish)
    controls, lacking = _controls(space, prompts, wish, mine, (base, processor, searched[:batch]))
    judged = asked("held out", rest, [mine.recipe, *(recipe for recipe, _ in controls)])
    name, told = taken(judged, mine.recipe.name, [recipe.name for recipe, _ in controls], wish)
    row = next(row for row in judged.rows if row.recipe == name)
    rivals: list[tuple[Recipe, Mapping[str, float | None]]] = [(mine.recipe, mine.cost), *controls]
    recipe, shares = next(pair for pair in rivals if pair[0].name == name)
    met, said = verdict(wish, row, cost_of(row, wish.kind), points, shares.get(wish.kind))
    about = _provenance(base, samples, wish, row, asking | {"metric": judged.about["metric"], "trials": trials})
    about |= {"searched": len(searched), "held_out": len(rest), "candidates": len(found)}
    changed: dict[str, Any] = {"name": f"tuned-{wish.kind}-{wish.share:g}", "description": said}
    if wish.kind == "latency":  # of what ran, and of nothing else
        changed |= {"backend": resolve(backend, base.device), "kernels": choose(kernels, base.device).kernel}
    final = recipe.model_copy(update=changed)
    result = Tuned(
        final if met else None,
        final,
        said,
        tuple(told + failed + lacking + doubts(wish, row, met) + list(judged.notes)),
        judged,
        with_front(points, wish.kind),
        space.profile,
        tuple(_tried(c) for c in found),
        about,
    )
    if path is not None:
        write(path, result)
    return result


def candidates(
    prompts: Prompts, wish: Wish, trials: int, seed: int, progress: Progress
) -> tuple[Space, list[Candidate], list[str]]:
    """What is searched, what the search has found, and a note on what failed.

    Raises:
        ValueError: no recipe can meet the budget.
    """
    floor = prompts.floor()
    if wish.share <= floor[wish.counted]:
        raise ValueError(
            f"budget {wish.kind}={wish.share:g}: no recipe can meet it, for without any vision tokens the prompts cost"
            f" {floor[wish.counted]:.3f} of the unmodified model's {KINDS[wish.counted]}: expected more than that"
        )
    progress("profile", 0, 1)
    space = Space(prompts.profile(batches_of(prompts.sizes, PROFILED)))
    found, failed = search(prompts, space, wish, trials, seed, lambda i: progress("candidates", i, trials))
    notes = [f"{len(failed)} recipes that were drawn failed, such as {failed[0]}"] if failed else []
    if not found:
        raise ValueError(
            f"budget {wish.kind}={wish.share:g}: none of {trials} recipes that were drawn can meet it, and without any"
            f" vision tokens the prompts cost {floor[wish.counted]:.3f}: expected more trials, or a larger budget"
            + "".join(f"; {note}" for note in notes)
        )
    return space, found, notes


def _inputs(base: Any, processor: Any, samples: Sequence[Sample], batch: int) -> Iterator[dict[str, Any]]:
    for start in range(0, len(samples), batch):
        some = samples[start : start + batch]
        try:
            made = encode(processor, some)
        except Exception:
            for sample in some:
                try:
                    encode(processor, [sample])
                except Exception as e:
                    said = " ".join(f"{type(e).__name__}: {e}".split())
                    raise ValueError(f"sample {sample.id!r} cannot be asked: {said}") from e
            raise
        yield dict(made.to(base.device, dtype=base.dtype))


def _recipe(solved: Solved, more: str) -> Recipe:
    """A recipe with a name of its own."""
    return Recipe(name=f"{'+'.join(p.name for p in solved.passes)} {more}", passes=solved.passes)


def _elsewhere(found: Sequence[Candidate], prompts: Prompts, wish: Wish) -> list[Solved]:
    """The best kinds of recipes, solved for other budgets."""
    kinds = dict[tuple[str, ...], Shape]()
    for c in found[:FINALISTS]:
        kinds.setdefault(tuple(p.name for p in c.solved.passes), c.solved.shape)
    shares = [share for times in _OTHER if (share := times * wish.share) < 0.95]
    made = [solve(shape, prompts, wish.counted, share) for shape in list(kinds.values())[:_KINDS] for share in shares]
    known = {repr(c.solved.passes) for c in found[:FINALISTS]}
    return [x for x in {repr(x.passes): x for x in made if x is not None}.values() if repr(x.passes) not in known]


def _points(done: Evaluation, recipes: Sequence[tuple[Recipe, Solved]]) -> list[Point]:
    rows = {row.recipe: row for row in done.rows}
    return [Point(r, {**s.shares, "latency": cost_of(rows[r.name], "latency")}, rows[r.name]) for r, s in recipes]


def _winner(done: Evaluation, points: Sequence[Point], names: list[str], wish: Wish) -> Point:
    """The best of the search; of a budget of latency, of all that were measured to keep it, if any did."""
    if wish.kind == "latency":
        kept = [p for p in points if cheap(wish, p.cost["latency"])]
        names = [p.recipe.name for p in kept] or names
    name = best(done, names)
    return next(p for p in points if p.recipe.name == name)


def _controls(
    space: Space, prompts: Prompts, wish: Wish, mine: Point, asked: tuple[Any, Any, Sequence[Sample]]
) -> tuple[list[tuple[Recipe, dict[str, float]]], list[str]]:
    """The controls that may cost as much, but for one that is the recipe itself, and why others are not there."""
    share = mine.cost[wish.counted] if wish.kind == "latency" else wish.share
    assert share is not None
    found, notes = list[tuple[Recipe, dict[str, float]]](), list[str]()
    for name, kind in space.controls.items():
        if name not in space.planned:
            try:
                found.append(smaller_pictures(kind, *asked, wish.counted, share))
            except Exception as e:  # of the processor, or of a tower that takes pictures of one size
                notes.append(f"no control of smaller pictures: {' '.join(str(e).split())}")
            continue
        solved = solve(space.control(name), prompts, wish.counted, share)
        if solved is None:
            notes.append(f"no control {name}: none costs at most {share:.3f} of the {KINDS[wish.counted]}")
        elif solved.passes != mine.recipe.passes:
            found.append((Recipe(name=name, passes=solved.passes), solved.shares))
    return found, notes


def _tried(candidate: Candidate) -> dict[str, Any]:
    told = {"passes": repr(candidate.solved.passes), **candidate.solved.shares}
    return told | {"kl": candidate.mean, "n": len(candidate.kl)}


def _provenance(base: Any, samples: Sequence[Sample], wish: Wish, row: Row, asking: dict[str, Any]) -> dict[str, Any]:
    packages = importlib.import_module("vlmrewrite"), torch, transformers, optuna()
    versions = {"python": platform.python_version()} | {p.__name__: p.__version__ for p in packages}
    model = {"name": base.config.name_or_path, **identity_of(base), "device": str(base.device)}
    told = {"budget": {wish.kind: wish.share}, "max_drop": wish.max_drop, "data": fingerprint(samples)}
    scored = {k: getattr(row, k) for k in ("n", "accuracy", "interval", "difference", "difference_interval")}
    return told | {"samples": len(samples), "score": scored, **asking, "model": model, "versions": versions}
