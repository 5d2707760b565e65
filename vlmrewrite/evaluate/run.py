"""Recipes on a user's samples, beside the unmodified model: how right they are, and what they cost."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from vlmrewrite.errors import shown
from vlmrewrite.evaluate.asking import encode, groups_of, said
from vlmrewrite.evaluate.given import Given, check_counts, checked
from vlmrewrite.evaluate.journal import PAGE, RESULTS, Journal, alone, opened, write_whole
from vlmrewrite.evaluate.metrics import Metric, rouge_l, token_match
from vlmrewrite.evaluate.page import page
from vlmrewrite.evaluate.results import Evaluation, rows_of
from vlmrewrite.evaluate.sample import Sample
from vlmrewrite.evaluate.subject import UNMODIFIED, Subject, divergence
from vlmrewrite.evaluate.together import Together
from vlmrewrite.hf import base_model_of
from vlmrewrite.ops import Backend, Kernels

FEW = 30
"""Samples, below which intervals are too wide to decide by."""

_HOPELESS = 8
"""Samples that fail under a recipe before any comes through, and then the run stops."""

Failed = dict[str, tuple[bool, list[str]]]
"""Of each subject in a batch: whether any sample came through, and the errors of the others."""


def evaluate(
    model: Any,
    processor: Any,
    data: Any,
    recipes: Any,
    *,
    metric: str | Metric = "auto",
    output: str | os.PathLike[str] | None = None,
    batch: int = 8,
    max_new_tokens: int = 32,
    backend: Backend = "auto",
    kernels: Kernels = "auto",
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Ask a model questions about images, unmodified and under each recipe, and compare answers and costs.

    Answers are greedy. Batches are the same for all, in the order of the data, and recipes take turns batch by batch.
    FLOPs and K/V bytes are those of :func:`vlmrewrite.report` for each batch. A sample that fails is left out of all
    rows and reported; the run goes on.

    Where ``torch.distributed`` has a process group, each process asks its share of the batches, and all of them return
    the same; the first one writes.

    Args:
        model: an unmodified model in eval mode, on any device.
        processor: its, with a tokenizer and an image processor.
        data: path of a ``.jsonl`` or ``.parquet`` file, or rows as a ``datasets.Dataset`` has them. A row has ``image``
            or ``images`` (paths relative to the file, bytes, PIL images), ``prompt`` or ``messages``, and ``answer``,
            ``answers``, ``choices`` with ``answer``, or none of these in all rows; optionally ``kind`` and ``id``.
        recipes: what to compare, each as :func:`vlmrewrite.apply` takes it.
        metric: ``"exact"``, ``"contains"``, ``"choice"``, ``"vqa"``, ``"anls"``, ``"number"``, ``"f1"``, ``"rouge"``,
            ``"iou"``, ``"iou50"``; ``"auto"``: choice where there are options, else exact; or a function of the output
            and the sample that returns a score from 0 to 1. Without references, and without a function, the score is
            the share of tokens that are the unmodified model's.
        output: folder that gets ``results.json``, ``samples.jsonl`` and ``report.html``. If it holds a run of the same
            data, recipes and settings that was cut off, that one goes on.
        batch: prompts at a time.
        max_new_tokens: of the longest answer.
        backend, kernels: for :func:`vlmrewrite.apply`.
        seed: of bootstrap intervals.
        progress: called with the number of samples that are done, and of all.

    Raises:
        ValueError: data, metric, recipe, model or folder cannot be used, or processes of a group were given different
            ones, or another run writes to the folder; of data one line for each faulty row. Nothing is written.
        TypeError: model, processor, data or recipes are nothing of the kind.
        RuntimeError: all of the first samples failed under a recipe, or no sample came through under all of them; or
            another process of the group failed.
    """
    check_counts(batch=batch, max_new_tokens=max_new_tokens)
    check_counts(0, seed=seed)
    batch, max_new_tokens, seed = int(batch), int(max_new_tokens), int(seed)  # NumPy's are no JSON
    together = Together()
    given = together.agreed(lambda: checked(model, processor, data, recipes, metric, backend, kernels))
    about = {**given.about, "batch": batch, "max_new_tokens": max_new_tokens}
    together.same(about | {"seed": seed, "output": None if output is None else str(output)})
    folder, first = None if output is None else Path(output), together.rank == 0
    with contextlib.ExitStack() as stack:
        together.agreed(lambda: None if folder is None or not first else stack.enter_context(alone(folder)))
        journal = opened(folder, about, together)
        return _evaluated(model, given, journal, together, about | {"seed": seed}, progress)


def _evaluated(
    model: Any,
    given: Given,
    journal: Journal,
    together: Together,
    about: dict[str, Any],
    progress: Callable[[int, int], None],
) -> Evaluation:
    """Ask what the journal does not hold yet, and put together what it holds then."""
    samples, subjects, score = given.samples, given.subjects, given.score
    names, batch, notes = [subject.name for subject in subjects], about["batch"], list[str]()
    if len(samples) < FEW:
        notes.append(f"{len(samples)} samples: intervals are wide below {FEW}")
        if together.rank == 0:
            warnings.warn(notes[0], stacklevel=3)
    if score is None:
        notes.append("the data has no references: scores are shares of tokens that are the unmodified model's")
    asking = _Asking(
        subjects, score, about["max_new_tokens"], {line["recipe"] for line in journal.lines if not line["error"]}
    )
    batches = [samples[start : start + batch] for start in range(0, len(samples), batch)]
    for turn in range(len(journal.batches)):
        progress(turn * batch, len(samples))
    for turn in range(len(journal.batches), len(batches), together.count):
        progress(turn * batch, len(samples))
        own = turn + together.rank
        made = together.each(lambda own=own: asking.ask(batches[own], own) if own < len(batches) else None)  # type: ignore[misc]
        together.agreed(lambda made=made: asking.keep(journal, [x for x in made if x is not None]))  # type: ignore[misc]
    progress(len(samples), len(samples))
    rows = rows_of(names, samples, journal.lines, journal.batches, about["seed"])
    failures = tuple({k: line[k] for k in ("id", "recipe", "error")} for line in journal.lines if line["error"])
    left = len({line["id"] for line in failures})
    notes += [f"{left} of {len(samples)} samples failed, and are in no row"] * bool(left)
    about |= {"device": str(base_model_of(model).device), "torch": torch.__version__}
    done = Evaluation(rows, tuple(journal.lines), failures, about, tuple(notes))
    together.agreed(lambda: _write(journal, done, samples))
    return done


def _write(journal: Journal, done: Evaluation, samples: Sequence[Sample]) -> None:
    if journal.folder is not None:
        write_whole(journal.folder / PAGE, page(done, samples, journal.batches))
        write_whole(journal.folder / RESULTS, json.dumps(done.to_dict(), indent=1) + "\n")


class _Asking:
    """Asks all subjects a batch."""

    def __init__(self, subjects: list[Subject], score: Metric | None, longest: int, answered: set[str]) -> None:
        self.subjects, self.score, self.longest = subjects, score, longest
        self.answered, self.failed = answered, dict.fromkeys((s.name for s in subjects), 0)

    def ask(self, samples: Sequence[Sample], turn: int) -> tuple[list[dict[str, Any]], dict[str, Any], Failed]:
        """The lines of a batch, what it cost, and who failed; who begins changes with the turn."""
        record: dict[str, Any] = {"costs": {}, "seconds": {}, "peak": {}, "refused": {}, "pictures": []}
        found: dict[str, dict[Any, dict[str, Any]]] = {s.name: {} for s in self.subjects}
        errors: dict[str, dict[Any, str]] = {s.name: {} for s in self.subjects}
        made = dict[int, tuple[list[tuple[Sequence[Sample], Any]], dict[Any, str]]]()
        first = turn % len(self.subjects)
        for subject in self.subjects[first:] + self.subjects[:first]:
            key = id(subject.processor)  # most have the model's
            groups, unasked = made[key] = made.get(key) or groups_of(subject.processor, samples)
            errors[subject.name] |= unasked
            for some, inputs in groups:
                self._answer(subject, some, inputs, record, found[subject.name], errors[subject.name])
            if turn == 0 and record["seconds"].get(subject.name):
                record["peak"][subject.name] = subject.peak()
        lines = []
        for sample in samples:
            base, before = found[UNMODIFIED].get(sample.id), None
            for subject in self.subjects:
                error = errors[subject.name].get(sample.id)
                line = {"id": sample.id, "recipe": subject.name, "output": None, "score": None, "error": error}
                lines.append(line)
                if error is None and base is None:
                    line["error"] = "not compared: the unmodified model failed"
                elif error is None and base is not None:
                    mine = found[subject.name][sample.id]
                    line |= self._judged(sample, mine, base)
                    before = line["score"] if subject.name == UNMODIFIED else before
                    if line["score"] not in (before, None):
                        record["pictures"].append({"id": sample.id, "recipe": subject.name, "images": mine["pictures"]})
        failed: dict[str, list[Any]] = {name: [x["error"] for x in lines if x["recipe"] == name] for name in found}
        return lines, record, {name: (None in said, [x for x in said if x]) for name, said in failed.items()}

    def _judged(self, sample: Sample, mine: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
        """How an answer is; where the metric fails, with the error, and no score."""
        alike = token_match(mine["tokens"], base["tokens"])
        score: Any = alike
        if self.score is not None:
            try:
                score = self.score(mine["output"], sample)
                if not isinstance(score, Real) or not 0 <= float(score) <= 1:
                    raise ValueError(f"expected a score from 0 to 1, got {shown(score)}")
            except Exception as e:
                return {"output": mine["output"], "error": f"the metric: {said(e)}"}
        return {
            "output": mine["output"],
            "score": float(score),
            "tokens": alike,
            "kl": divergence(base["first"], mine["first"])[0],
            "rouge_l": rouge_l(mine["output"].split(), base["output"].split()),
        }

    def _answer(
        self,
        subject: Subject,
        samples: Sequence[Sample],
        inputs: Any,
        record: dict[str, Any],
        found: dict[Any, dict[str, Any]],
        errors: dict[Any, str],
    ) -> None:
        """Ask one subject; where a batch fails, sample by sample."""
        made, why = None, ""
        own = self.subjects[0].processor
        try:
            whole = None if subject.processor is own else encode(own, samples)
            made = subject.answer(inputs, self.longest, whole)
        except Exception as e:
            why = said(e)  # not the error itself, which holds what the failed call held
        if made is None:
            if len(samples) == 1:
                errors[samples[0].id] = why
                return
            record["seconds"][subject.name] = None
            for sample in samples:
                self._answer(subject, [sample], encode(subject.processor, [sample]), record, found, errors)
            return
        seconds = record["seconds"]
        seconds[subject.name] = None if subject.name in seconds else [made.prefill, made.decode]
        if made.costs is not None:
            so_far = record["costs"].setdefault(subject.name, {key: [0, 0] for key in made.costs})
            for key, pair in made.costs.items():
                so_far[key] = [a + b for a, b in zip(so_far[key], pair, strict=True)]
        if made.refused:
            record["refused"][subject.name] = made.refused
        for i, sample in enumerate(samples):
            if no_numbers := made.no_numbers(i):
                errors[sample.id] = no_numbers
                continue
            found[sample.id] = {
                "output": made.outputs[i],
                "tokens": made.tokens[i],
                "first": made.first[i : i + 1],
                "pictures": made.pictures[i] if made.pictures else [],
            }

    def keep(self, journal: Journal, batches: Sequence[tuple[list[dict[str, Any]], dict[str, Any], Failed]]) -> None:
        """Put batches in the journal, in their order.

        Raises:
            RuntimeError: nothing but failures has come of a subject so far, and these are many.
        """
        for lines, record, failed in batches:
            for name, (some, errors) in failed.items():
                self.answered |= {name} if some else set()
                self.failed[name] += len(errors)
                if name not in self.answered and self.failed[name] >= _HOPELESS:
                    raise RuntimeError(f"{name}: all of the first {self.failed[name]} samples failed: {errors[-1]}")
            journal.add(lines, record)
