"""Of what takes long a run of folders takes a part; who names a file, a test or a keyword has all of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest
from tests.thin import PARTS, left_out, turn


class Case:
    def __init__(self, nodeid: str, *marks: str) -> None:
        self.nodeid, self.marks = nodeid, marks

    def get_closest_marker(self, name: str) -> bool:
        return name in self.marks


def cases(name: str, n: int, *marks: str) -> Any:
    return [Case(f"{name}[{i}]", *marks) for i in range(n)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 10])
def test_a_third_of_the_cases_and_at_least_one(size: int) -> None:
    for name in ("one", "two", "three", "four"):
        some, plain = cases(name, size, "wide"), cases("plain", 4)
        left = left_out(some + plain, 0)
        assert not left & {*plain}
        assert max(1, size // 3) <= size - len(left) <= -(-size // 3)


def test_other_tests_take_other_cases() -> None:
    some = [case for i in range(20) for case in cases(f"test_{i}", 3, "wide")]
    assert {case.nodeid[-3:] for case in {*some} - left_out(some, 0)} == {"[0]", "[1]", "[2]"}


def test_slow_tests_take_turns() -> None:
    some = [case for i in range(60) for case in cases(f"test_{i}", 2, "slow")] + [Case("alone", "slow")]
    runs = [{*some} - left_out(some, i) for i in range(PARTS)]
    assert sum(map(len, runs)) == len({*some}) == len(set.union(*runs))
    assert all(20 < len(run) < 60 for run in runs)
    assert turn() in range(PARTS)


@pytest.mark.parametrize(
    ("how", "all_of_them"),
    [
        ({}, False),
        ({"wide": True}, True),
        ({"keyword": "budget"}, True),
        ({"args": ["tests/unit/test_wide.py"]}, True),
        ({"args": ["a.py::one"]}, True),
        ({"args": ["tests/unit"]}, False),
        ({"marks": "slow"}, True),
        ({"marks": "not slow"}, False),
    ],
)
def test_whoever_asks_has_all(how: dict[str, Any], all_of_them: bool) -> None:
    left: list[Any] = []
    config: Any = SimpleNamespace(
        option=SimpleNamespace(keyword=how.get("keyword", ""), markexpr=how.get("marks", "")),
        args=how.get("args", ["tests"]),
        getoption=lambda _: how.get("wide", False),
        hook=SimpleNamespace(pytest_deselected=lambda items: left.extend(items)),
    )
    items = cases("one", 10, "wide")
    conftest.pytest_collection_modifyitems(config, items)
    assert (len(items) == 10) is all_of_them
    assert len(items) + len(left) == 10
    assert (conftest.pytest_report_header(config).endswith("all cases")) is all_of_them
