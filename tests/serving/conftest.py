"""Engines of other libraries: `make serving` runs these tests in an environment of their own."""

import importlib.util

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    there = importlib.util.find_spec("vllm") is not None
    for item in items:
        if "serving" in item.path.parts:
            item.add_marker(pytest.mark.skipif(not there, reason="vLLM is not installed: make serving"))
            for kind in ("FutureWarning", "DeprecationWarning", "UserWarning"):  # theirs to mend
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{kind}"))
