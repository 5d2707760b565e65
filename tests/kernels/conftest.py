"""Kernels are tested on the GPU if there is one, in Triton's interpreter otherwise."""

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import is_hypothesis_test, settings

from tests.kernels.compiling import COMPILING, FILES, start

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from vlmrewrite.testing.triton.interpreter import trustworthy

    trustworthy()


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


HERE = Path(__file__).parent


def _compiled(item: pytest.Item) -> bool:
    return "compiled" in getattr(item, "fixturenames", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_compiled)
    for item in items if settings.get_current_profile_name() == "ci" else []:
        test = getattr(item, "obj", None)
        if item.path.parent == HERE and is_hypothesis_test(test):  # the interpreter takes its time
            own = test._hypothesis_internal_use_settings
            test._hypothesis_internal_use_settings = settings(own, max_examples=min(own.max_examples, 3))


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    """What is to be compiled is compiled beside the other tests, and looked at after them."""
    if session.config.option.collectonly or not any(map(_compiled, session.items)):
        return (yield)
    from vlmrewrite.testing.triton.aot import TARGETS

    folder = Path(tempfile.mkdtemp())
    running = {target: start(FILES, target, folder / target) for target in TARGETS}
    session.config.stash[COMPILING] = running
    try:
        return (yield)
    finally:
        for one in running.values():
            one.process.kill()
        shutil.rmtree(folder, ignore_errors=True)
