"""The table of families: what a cell says, when it is worse, how it is kept and printed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmrewrite.errors import CaptureError
from vlmrewrite.oracle.hooks import _attention
from vlmrewrite.registry import find_pass
from vlmrewrite.runtime import session_of
from vlmrewrite.testing.agreement import Agreement
from vlmrewrite.testing.matrix import table
from vlmrewrite.testing.matrix.cases import CASES, TECHNIQUES
from vlmrewrite.testing.matrix.cells import MARKS, MEANINGS, Cell, Record, judged, one_line
from vlmrewrite.testing.models import ZOO

OK = Cell("ok", 1e-6, 1e-5)
REFUSED, ABSENT = Cell("refused", reason="no grid"), Cell("absent", reason="the family takes no videos")
WRONG, FAILED = Cell("wrong", 1.0, 1e-5, "logits are 1 off"), Cell("failed", reason="IndexError: 3")


def record(graphs: tuple[int, int] | None = (2, 2), **cells: Cell) -> Record:
    return Record("torch 2.13.0", 1.5, graphs, {"trace": {"Stride": Cell("ok")}, "prefill": cells})


# ---- cells


@pytest.mark.parametrize(
    ("found", "cell"),
    [
        (Agreement(1.26e-6, 1e-5), Cell("ok", 1.3e-6, 1e-5)),
        (Agreement(0.0, 1e-5, kv_lengths=[3], planned=[3]), Cell("ok", 0.0, 1e-5)),
        (Agreement(1.1e-5, 1e-5), Cell("wrong", 1.1e-5, 1e-5, "logits are 1.1e-05 off; 1e-05 is allowed")),
        (Agreement(float("nan"), 1e-5), Cell("wrong", None, 1e-5, "logits are nan off; 1e-05 is allowed")),
        (
            Agreement(0.0, 1e-5, kv_lengths=[3], planned=[4]),
            Cell("wrong", 0.0, 1e-5, "K/V lengths [3]; [4] were planned"),
        ),
        (None, Cell("ok")),
    ],
)
def test_what_a_comparison_comes_to(found: Agreement | None, cell: Cell) -> None:
    assert judged(lambda: found) == cell


def raising(error: Exception) -> Any:
    def check() -> None:
        raise error

    return check


def test_a_refusal_is_one_that_vlmrewrite_raised() -> None:
    assert judged(lambda: find_pass("strid")).status == "refused"  # type: ignore[arg-type, return-value]
    assert judged(raising(ValueError("of this test"))).status == "failed"
    assert judged(lambda: torch.zeros(3)[5]).status == "failed"  # type: ignore[arg-type, return-value]
    unknown = judged(lambda: session_of(torch.nn.Linear(1, 1)).recipe.passes[0])  # type: ignore[arg-type, return-value]
    assert unknown.status == "refused"
    assert unknown.reason.startswith("this Linear is not rewritten; expected a model")


def test_what_the_oracle_cannot_judge_is_no_refusal() -> None:
    mask = torch.ones(1, 1, 2, 2)
    cell = judged(lambda: _attention(torch.nn.Linear(1, 1), mask, mask, mask, mask))  # type: ignore[arg-type, return-value]
    assert (cell.status, cell.reason[:11]) == ("failed", "not judged:")


def test_the_reason_of_a_failed_capture_is_its_message() -> None:
    reason = judged(raising(CaptureError("short", "all that\nis known"))).reason
    assert reason.startswith("CaptureError: short (test_matrix.py, ")


def test_a_reason_is_one_line_without_this_machines_folders() -> None:
    text = 'node a (File "/a/b/python3.11/site-packages/transformers/x.py", line 3\n  y = 1) and /c/vlmrewrite/api.py'
    assert one_line(text) == 'node a (File "transformers/x.py", line 3 y = 1) and vlmrewrite/api.py'
    assert one_line("a" * 999, " (b)") == "a" * 297 + "... (b)"


def test_which_cells_are_worse() -> None:
    every = [OK, REFUSED, ABSENT, WRONG, FAILED]
    found = {(old.status, new.status) for old in every for new in every if new.worse_than(old)}
    bad = [(old, new) for old in ("refused", "absent") for new in ("wrong", "failed")]
    assert found == {("ok", new) for new in ("refused", "absent", "wrong", "failed")} | {*bad, ("wrong", "failed")}


def test_what_is_worse_in_a_record() -> None:
    kept = record(Stride=OK, STS=REFUSED)
    assert record(Stride=OK, STS=OK).worse_than(kept) == []
    assert record((1, 2), Stride=OK, STS=REFUSED, FastV=FAILED).worse_than(kept) == []
    assert record((2, 3), Stride=REFUSED).worse_than(kept) == [
        "prefill, Stride: ok (1e-06 of 1e-05) -> refused: no grid",
        "prefill, STS: refused: no grid -> not measured",
        "graphs: 2+2 -> 2+3",
    ]
    assert record(None, Stride=OK, STS=OK).worse_than(kept) == ["graphs: 2+2 -> ?"]


# ---- the kept table


def test_what_is_kept_is_what_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    families = {"b": record(None, Stride=OK, STS=WRONG), "a": record(Stride=Cell("ok"), STS=ABSENT)}
    families["b"].alone = "ValueError: not both"
    table.write(families, path)
    assert table.read(path) == families
    assert list(table.read(path)) == ["a", "b"]
    assert json.loads(path.read_text())["a"] == json.loads(json.dumps(table.record_data(families["a"])))
    lines = path.read_text().splitlines()
    assert '      "STS": {"status": "wrong", "error": 1.0, "tolerance": 1e-05, "reason": "logits are 1 off"}' in lines
    assert [p.name for p in tmp_path.iterdir()] == ["kept.json"]


def test_a_file_that_holds_no_table(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    assert table.read_if_there(path) == {}
    path.write_text('{"llava": {"cells": {}}}')
    with pytest.raises(ValueError, match=r"kept\.json: the table of families cannot be used: KeyError: 'graphs'"):
        table.read(path)


def test_a_family_that_the_table_lacks_is_worse(tmp_path: Path) -> None:
    path = tmp_path / "kept.json"
    table.write({"a": record(Stride=OK)}, path)
    assert table.worse("a", record(Stride=OK), path) == []
    [line] = table.worse("b", record(Stride=OK), path)
    assert line.endswith("measure and keep it: vlmrewrite families --run --family b")


def test_fifths_are_everything_once() -> None:
    names = [f"n{i:02}" for i in range(23)]
    fifths = [table.fifth(list(reversed(names)), k) for k in range(5)]
    assert sorted(name for part in fifths for name in part) == names
    assert {len(part) for part in fifths} == {4, 5}


def test_the_printed_table() -> None:
    families = {"aya": record(Stride=OK, STS=REFUSED), "bee": record(None, Stride=WRONG, STS=FAILED)}
    text = list(table.marks(families))
    assert text[:3] == ["     trace  prefill  graphs", "aya  .?     .r       2+2", "bee  .?     WX       ?"]
    assert text[4:] == [
        "marks, from left to right: Stride, STS",
        "  . ok       agrees with the oracle",
        "  r refused  an error says why not",
        "  W wrong    differs from the oracle",
        "  X failed   an exception that is no refusal, or nothing to judge by",
        "  - absent   the unmodified model does not do it",
    ]
    assert set(MARKS) == set(MEANINGS)


def test_all_about_a_family() -> None:
    assert list(table.details("aya", record(Stride=OK, STS=REFUSED, FastV=REFUSED))) == [
        "aya: captured in 1.5 s; graphs of batches + of one row: 2+2; torch 2.13.0",
        "  trace     Stride: ok",
        "  prefill   Stride: ok (1e-06 of 1e-05)",
        "  prefill   STS, FastV: refused: no grid",
    ]


def test_the_table_of_this_repository() -> None:
    kept = table.read(table.KEPT)
    assert set(kept) <= set(ZOO)
    for found in kept.values():
        assert list(found.cells) == list(CASES)
        assert all(list(row) == list(TECHNIQUES) for row in found.cells.values())
        assert all(c.reason for row in found.cells.values() for c in row.values() if c.status != "ok")
    assert max(map(len, table.marks(kept))) <= 80
    assert not re.search(r"[\s\"'](/\w+)+/", table.KEPT.read_text()), "a folder of the machine that made it"
