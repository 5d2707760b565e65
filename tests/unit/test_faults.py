"""The list of seeded faults does not rot: each can still be applied, and still changes what the code does."""

from __future__ import annotations

import ast
import re

import pytest

from tests.mutants.__main__ import Verdict, chosen, told
from tests.mutants.faults import ROOT, Fault, faults
from tests.mutants.trial import TOO_LATE

ALL = faults()


def by_name(fault: Fault) -> str:
    return fault.name


@pytest.mark.parametrize("fault", ALL, ids=by_name)
def test_a_fault_changes_code_that_is_there(fault: Fault) -> None:
    text = (ROOT / fault.file).read_text()
    before, after = ast.parse(text), ast.parse(fault.applied(text))
    assert ast.dump(before) != ast.dump(after)


@pytest.mark.parametrize("fault", ALL, ids=by_name)
def test_what_is_said_of_a_fault(fault: Fault) -> None:
    assert re.fullmatch(r"[A-Z].*\.", fault.wrong), "expected one sentence"
    assert (ROOT / fault.file).resolve() == ROOT / fault.file, "expected the file itself, not a way through a link"
    assert fault.near
    for test in fault.near:
        path, _, name = test.partition("::")
        assert not name or f"\ndef {name}(" in (ROOT / path).read_text(), f"expected a test {test}"
        assert path.split("/")[1] in ("unit", "graph", "property", "kernels"), f"{test} is in none of the tiers"


def test_every_part_has_its_faults() -> None:
    assert len({fault.name for fault in ALL}) == len(ALL) >= 40
    parts = {fault.file.split("/")[-2 if fault.file.startswith("vlmrewrite/") else 0] for fault in ALL}
    assert parts >= {"plan", "rewrite", "ops", "kvcache", "lower", "runtime", "capture", "hf", "analysis", "report"}
    assert parts >= {"kernels", "passes"}


@pytest.mark.parametrize("text", ["", "x = 1\nx = 1\n"])
def test_a_text_that_is_not_there_once_is_refused(text: str) -> None:
    fault = Fault("f", "k", "a.py", "x = 1", "x = 2", "W.", ())
    with pytest.raises(ValueError, match=r"'f': expected its `old` once in a\.py, found it [02] times"):
        fault.applied(text)


def verdicts(found: int, of: int, how: str = "tests/unit/test_x.py::test_y") -> list[Verdict]:
    fault = Fault("f", "k", "a.py", "x = 1", "x = 2", "X is 2.", ())
    return [Verdict(fault, how if i < found else None, 1.0) for i in range(of)]


@pytest.mark.parametrize(("found", "of", "status"), [(19, 20, 0), (18, 20, 1), (2, 3, 1), (3, 3, 0)])
def test_nineteen_of_twenty_are_enough(found: int, of: int, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(verdicts(found, of)) == status
    said = capsys.readouterr().out
    assert f"{found} of {of} found: {found} by quick\n" in said
    assert said.count("survived: f (a.py): X is 2.\n") == of - found


def test_what_only_ran_out_of_time_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert told([*verdicts(1, 1, TOO_LATE), *verdicts(1, 1, "tests/kernels/test_x.py::test_y")]) == 0
    assert "2 of 2 found: 1 by kernels; 1 only by their time-out" in capsys.readouterr().out


def test_a_sample_is_that_of_its_seed() -> None:
    drawn = [chosen([], 3, seed) for seed in ("a", "a", "b")]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len({fault.name for fault in drawn[0]}) == 3
    assert chosen([ALL[1].name], None, "0") == [ALL[1]]
    with pytest.raises(ValueError, match="there is no fault 'typo'; expected one of budget-rounds-down, "):
        chosen(["typo"], None, "0")
    with pytest.raises(ValueError, match="expected a sample of at least 1 fault, got 0"):
        chosen([], 0, "0")
