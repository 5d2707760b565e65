"""What came out of an evaluation: for each recipe, how right it is and what it costs, beside the unmodified model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from vlmrewrite.evaluate.sample import Sample
from vlmrewrite.evaluate.statistics import interval, mean, paired
from vlmrewrite.evaluate.subject import UNMODIFIED
from vlmrewrite.markup import Shown
from vlmrewrite.text import byte_size, table


@dataclass(frozen=True)
class Scored:
    """How right a recipe is on some samples; shares, 95 % intervals, and everything paired with the unmodified model.

    Attributes:
        n: samples.
        accuracy, interval: mean score, from 0 to 1.
        difference, difference_interval: of the accuracy, to the unmodified model's.
        changed: samples that score otherwise than with the unmodified model: ``better`` or ``worse``.
        mcnemar: probability of a split as uneven as that one if recipe and model were alike.
    """

    n: int
    accuracy: float
    interval: tuple[float, float]
    difference: float
    difference_interval: tuple[float, float]
    changed: int
    better: int
    worse: int
    mcnemar: float


@dataclass(frozen=True)
class Row(Scored):
    """A recipe, or the unmodified model.

    Attributes:
        recipe: its name.
        flops, kv: of the prefills, as shares of the unmodified model's; None where no sample could be asked.
        prefill, decode: speeds as multiples of the unmodified model's, medians over the batches, which took turns: from
            encoded images to the logits of the first token (where ``generate()`` does not encode them apart, with
            that), and for each further token; None where there was nothing to measure.
        prefill_seconds, decode_seconds: medians: of a batch, and of a token of it.
        peak_bytes: of the decoder in the first batch's prefill, as :func:`vlmrewrite.report` predicts it.
        agreement: with the unmodified model: ``tokens`` (share of places with the same one), ``kl`` (of the first
            token, nats) and ``rouge_l``, means.
        kinds: the same as here by kind of sample.
        refused: passes that did nothing, and why.
    """

    recipe: str
    flops: float | None
    kv: float | None
    prefill: float | None
    decode: float | None
    prefill_seconds: float | None
    decode_seconds: float | None
    peak_bytes: int | None
    agreement: dict[str, float]
    kinds: dict[str, Scored] = field(default_factory=dict)
    refused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation(Shown):
    """What :func:`vlmrewrite.evaluate` found. ``str`` is a table, ``to_dict`` for JSON.

    Attributes:
        rows: the unmodified model's first, then one a recipe, in order; all of the same samples.
        samples: a mapping for each sample and recipe: id, recipe, output, score, and agreement with the model.
        failures: samples that failed, with the recipe and the error. They are in no row, whichever recipe it was.
        about: model, data, metric and settings.
        notes: what is to be kept in mind.
    """

    rows: tuple[Row, ...]
    samples: tuple[dict[str, Any], ...] = field(repr=False)
    failures: tuple[dict[str, Any], ...]
    about: dict[str, Any]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, dicts, numbers and strings, without the samples."""
        rows = [{"recipe": row.recipe} | asdict(row) for row in self.rows]
        found = {"rows": rows, "failures": self.failures, "notes": self.notes, "about": self.about}
        plain: dict[str, Any] = json.loads(json.dumps(found))
        return plain

    def cells(self) -> list[list[str]]:
        """The table as text, its headings first."""
        agreement = self.about["metric"] == AGREEMENT
        score = "agreement" if agreement else "accuracy"
        head = ["recipe", score, "difference", "changed", "FLOPs", "K/V", "prefill", "decode", "peak"]
        return [head + ["KL", "ROUGE-L"] * agreement, *(self._cells(row, agreement) for row in self.rows)]

    def _cells(self, row: Row, agreement: bool) -> list[str]:
        moved = ["", ""]
        if row.recipe != UNMODIFIED:
            bounds = " to ".join(f"{100 * x:+.1f}" for x in row.difference_interval)
            moved = [f"{100 * row.difference:+.1f} ({bounds})", f"{row.changed} (+{row.better} -{row.worse})"]
        shares = ["" if x is None else f"{x:.2f}" for x in (row.flops, row.kv)]
        speeds = ["" if x is None else f"×{x:.2f}" for x in (row.prefill, row.decode)]
        peak = "" if row.peak_bytes is None else byte_size(row.peak_bytes)
        alike = [f"{row.agreement['kl']:.3g}", f"{row.agreement['rouge_l']:.3f}"] if agreement else []
        within = " to ".join(f"{100 * x:.1f}" for x in row.interval)
        return [row.recipe, f"{100 * row.accuracy:.1f} ({within})", *moved, *shares, *speeds, peak, *alike]

    def __str__(self) -> str:
        lines = [f"{self.rows[0].n} samples, {self.about['metric']}", *table(self.cells())]
        lines += [f"{row.recipe}: does nothing: {reason}" for row in self.rows for reason in row.refused]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


AGREEMENT = "agreement"
"""The metric of data without references: share of tokens that are the unmodified model's."""


def rows_of(
    names: Sequence[str],
    samples: Sequence[Sample],
    lines: Sequence[dict[str, Any]],
    batches: Sequence[dict[str, Any]],
    seed: int,
) -> tuple[Row, ...]:
    """The rows of a run.

    Args:
        names: of the recipes, the unmodified model's first.
        samples: all of the data.
        lines: of each sample and recipe: see :class:`vlmrewrite.evaluate.journal.Journal`.
        batches: what each batch cost.
        seed: of bootstraps.

    Raises:
        RuntimeError: no sample was answered under all recipes.
    """
    found = {(line["recipe"], line["id"]): line for line in lines}
    whole = [s for s in samples if all(found[name, s.id]["score"] is not None for name in names)]
    if not whole:
        first = next(line for line in lines if line["score"] is None)
        raise RuntimeError(
            f"no sample was answered under all recipes; {first['id']!r} under {first['recipe']}: {first['error']}"
        )

    def scored(name: str, some: Sequence[Sample]) -> Scored:
        before, after = ([found[n, s.id]["score"] for s in some] for n in (names[0], name))
        pair = paired(before, after, seed)
        moved = pair.interval if name != names[0] else (0.0, 0.0)
        changed = pair.better + pair.worse
        return Scored(len(some), mean(after), interval(after, seed), pair.difference, moved, changed, *pair[2:])

    kinds = dict.fromkeys(s.kind for s in whole if s.kind is not None)
    peak: dict[str, Any] = next((batch["peak"] for batch in batches if batch["peak"]), {})
    rows = []
    for name in names:
        own = [found[name, s.id] for s in whole]
        seconds = [[_speed(batch, n, i) for batch in batches] for n in (names[0], name) for i in (0, 1)]
        base, mine = seconds[:2], seconds[2:]
        before = next((x["before"] for x in peak.values() if x), None)
        used = before if name == names[0] else peak.get(name, {}).get("after")
        rows.append(
            Row(
                **asdict(scored(name, whole)),
                recipe=name,
                flops=_share(batches, name, "flops") if name != names[0] else 1.0,
                kv=_share(batches, name, "kv_bytes") if name != names[0] else 1.0,
                prefill=_middle([b / a for a, b in zip(mine[0], base[0], strict=True) if a and b]),
                decode=_middle([b / a for a, b in zip(mine[1], base[1], strict=True) if a and b]),
                prefill_seconds=_middle([x for x in mine[0] if x]),
                decode_seconds=_middle([x for x in mine[1] if x]),
                peak_bytes=used,
                agreement={key: mean([line[key] for line in own]) for key in ("tokens", "kl", "rouge_l")},
                kinds={kind: scored(name, [s for s in whole if s.kind == kind]) for kind in kinds},
                refused=tuple(dict.fromkeys(x for batch in batches for x in batch["refused"].get(name, ()))),
            )
        )
    return tuple(rows)


def _speed(batch: dict[str, Any], name: str, phase: int) -> float | None:
    seconds = batch["seconds"].get(name)
    return None if seconds is None else seconds[phase]


def _share(batches: Sequence[dict[str, Any]], name: str, key: str) -> float | None:
    pairs = [batch["costs"][name][key] for batch in batches if name in batch["costs"]]
    before = sum(pair[1] for pair in pairs)
    return sum(pair[0] for pair in pairs) / before if before else None


def _middle(values: Sequence[float]) -> float | None:
    return median(values) if values else None
