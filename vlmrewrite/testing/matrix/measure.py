"""Everything about one family, piece by piece, in the process that asks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers

from vlmrewrite.api import applied
from vlmrewrite.capture import captures_of
from vlmrewrite.plan import Pass
from vlmrewrite.runtime import trace
from vlmrewrite.testing.matrix.cases import CASES, IMAGES, LAYERS, TECHNIQUES, Case, fitted
from vlmrewrite.testing.matrix.cells import Cell, judged
from vlmrewrite.testing.models import ZOO, Row, TinyVLM

Piece = tuple[str, Any]
"""The name of a record's field and its value; of a cell, ``"cell"`` and ``(case, technique, cell)``."""

VERSIONS = f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def measure(name: str) -> Iterator[Piece]:
    """What is found out about a family, as it comes.

    Raises:
        KeyError: it has no builder.
    """
    tiny = ZOO[name](layers=LAYERS)
    tiny.model.requires_grad_(False)  # recipes with blocks of their own do so, and graphs are captured for one of both
    yield "versions", VERSIONS
    yield "capture_seconds", capture_seconds(tiny)
    yield "graphs", graphs(tiny)
    techniques = fitted(tiny)
    yield "moved", {name: repr(p) for name, p in techniques.items() if p != TECHNIQUES[name]}
    for case_name, case in CASES.items():
        lacking, amiss = case.lacking(tiny), list[Cell | None]()
        case, why = (case, None) if lacking else case.fitting(tiny)
        if why is not None:
            yield "alone", why
        for technique_name, technique in techniques.items():
            cell = Cell("absent", reason=lacking) if lacking else tried(tiny, case, technique, amiss)
            yield "cell", (case_name, technique_name, cell)


def tried(tiny: TinyVLM, case: Case, technique: Pass, amiss: list[Cell | None]) -> Cell:
    """One cell.

    Args:
        tiny, case, technique: what is tried.
        amiss: what is wrong with the unmodified model; found out when it is first needed, and put here.
    """
    cell = judged(lambda: case.check(tiny, tiny.inputs(case.rows), technique))
    if cell.status != "ok":
        amiss[:] = amiss or [case.amiss(tiny)]
        if amiss[0] is not None and (amiss[0].status == "absent" or cell.status == "wrong"):
            return amiss[0]
    return cell


def capture_seconds(tiny: TinyVLM) -> float | None:
    """CPU time to capture the forward for a padded batch, and to analyse it; None if that cannot be done."""
    begun = time.process_time()
    try:
        trace(tiny.model, tiny.inputs(IMAGES))
    except Exception:  # the cells of the case `trace` tell it
        return None
    return round(time.process_time() - begun, 1)


@torch.no_grad()
def graphs(tiny: TinyVLM) -> tuple[int, int] | None:
    """How many graphs ``generate()`` needs for batches, and how many more for one row; None if it does not work."""
    more = [Row(1, 5, 1), Row(1, 2, 7), Row(3, 1, 1), Row(0, 6, 2)]
    batches = [tiny.inputs(IMAGES), tiny.inputs(more, seed=1), *unpadded(tiny, 2, Row(1, 3, 2))]
    single = [tiny.inputs([Row(1, 3, 2)]), tiny.inputs([Row(2, 1, 6)], seed=1)]
    single.append(padded(tiny.inputs([Row(1, 1, 4)], seed=2)))
    counts = []
    try:
        with applied(tiny.model, TECHNIQUES["Stride"]):
            for prompts in (batches, single):
                before = len(captures_of(tiny.model).call.graphs)
                for inputs in prompts:
                    tiny.model.generate(**inputs, do_sample=False, max_new_tokens=1)
                counts.append(len(captures_of(tiny.model).call.graphs) - before)
    except Exception:  # the cells of the case `generate` tell it
        return None
    return counts[0], counts[1]


def unpadded(tiny: TinyVLM, rows: int, row: Row) -> list[dict[str, Any]]:
    """Two batches without padding: the sizes of images are drawn until they agree."""
    drawn = (tiny.inputs([row] * rows, seed=seed) for seed in range(50))
    return [inputs for inputs in drawn if bool(inputs["attention_mask"].all())][:2]


def padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same with two tokens of padding on the left."""
    shape = inputs["input_ids"].shape

    def of_tokens(x: Any) -> bool:
        return isinstance(x, torch.Tensor) and x.shape == shape

    return {k: torch.nn.functional.pad(x, (2, 0)) if of_tokens(x) else x for k, x in inputs.items()}
