"""Kernels are tested on the GPU if there is one, in Triton's interpreter otherwise."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import is_hypothesis_test, settings

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from vlmrewrite.testing.triton.interpreter import trustworthy

    trustworthy()


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items if settings.get_current_profile_name() == "ci" else []:
        test = getattr(item, "obj", None)
        if item.path.parent == HERE and is_hypothesis_test(test):  # the interpreter takes its time
            own = test._hypothesis_internal_use_settings
            test._hypothesis_internal_use_settings = settings(own, max_examples=min(own.max_examples, 3))
