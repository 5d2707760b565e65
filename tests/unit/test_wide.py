"""Of tests with many cases a run of folders takes a third; who names a file, a test or a keyword has all of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from tests import conftest


class Case:
    def __init__(self, nodeid: str, wide: bool) -> None:
        self.nodeid, self.wide = nodeid, wide

    def get_closest_marker(self, name: str) -> bool:
        return name == "wide" and self.wide


def taken(sizes: dict[str, int], wide: bool = False, keyword: str = "", args: tuple[str, ...] = ("tests",)) -> Any:
    """Which cases run of tests marked wide, of so many cases each; and one test that is not, ``plain[0]``."""
    items: list[Any] = [Case(f"{name}[{i}]", wide=True) for name, n in sizes.items() for i in range(n)]
    items.append(Case("plain[0]", wide=False))
    left: list[Any] = []
    config: Any = SimpleNamespace(
        option=SimpleNamespace(keyword=keyword),
        args=args,
        getoption=lambda _: wide,
        hook=SimpleNamespace(pytest_deselected=lambda items: left.extend(items)),
    )
    every = len(items)
    conftest.pytest_collection_modifyitems(config, items)
    assert len(items) + len(left) == every
    return [item.nodeid for item in items]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 10])
def test_a_third_of_the_cases_and_at_least_one(size: int) -> None:
    for name in ("one", "two", "three", "four"):
        found = taken({name: size})
        assert found[-1] == "plain[0]"
        assert size // 3 <= len(found) - 1 <= -(-size // 3)
        assert len(found) > 1


def test_other_tests_take_other_cases() -> None:
    firsts = {taken({f"test_{i}": 3})[0].partition("[")[2] for i in range(20)}
    assert firsts == {"0]", "1]", "2]"}


@pytest.mark.parametrize(
    "how", [{"wide": True}, {"keyword": "budget"}, {"args": ("tests/unit/test_wide.py",)}, {"args": ("a.py::one",)}]
)
def test_whoever_asks_has_all(how: dict[str, Any]) -> None:
    assert len(taken({"one": 10}, **how)) == 11
