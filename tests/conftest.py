"""Hypothesis profiles, and tiny models shared by all tests (a model's captured graphs are kept with it)."""

import gc
import os
import sys
import zlib
from collections.abc import Iterator
from weakref import WeakValueDictionary

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of processes that tests start: tests themselves run on all cores
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as it is without; Triton 3.9 warns if it is not said

import torch

if "TRITON_INTERPRET" not in os.environ and not torch.cuda.is_available():
    assert "triton" not in sys.modules, "triton reads TRITON_INTERPRET as it is imported, and was imported before"
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from tests.small import family
from tests.thin import PARTS, left_out, turn
from vlmrewrite.capture import dynamo, traces
from vlmrewrite.kvcache import layer
from vlmrewrite.testing.models import TinyVLM

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
settings.register_profile("ci", max_examples=5, deadline=None, suppress_health_check=_SLOW, derandomize=True)
settings.register_profile("long", max_examples=700, deadline=None, suppress_health_check=_SLOW)
settings.load_profile("ci")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-config", action="store_true", help="compile kernels in every configuration (minutes)")
    parser.addoption("--wide", action="store_true", help="all slow tests, and all cases of tests marked wide")


def pytest_report_header(config: pytest.Config) -> str:
    if not _thin(config):
        return "of slow tests and of tests marked wide: all cases"
    part = f"part {turn() + 1} of {PARTS}, as the commit is"
    return f"of slow tests {part}; of tests marked wide one of {PARTS} cases; all of them: --wide"


def _thin(config: pytest.Config) -> bool:
    """Whether whole folders run, and of what takes long a part: who names files, tests or marks has all of them."""
    marks = config.option.markexpr and "not" not in config.option.markexpr
    named = marks or config.option.keyword or any(".py" in argument for argument in config.args)
    return not (config.getoption("--wide") or named)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _thin(config):
        left = left_out(items, turn())
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=[*left])


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    dynamo.LIMIT = 256  # all tests share a model, and call it in all ways there are
    traces._KNOWN = {}  # what was captured of a form stays when its models are gone, for those of later tests
    gc.disable()
    torch._dynamo.config.run_gc_after_compile = False
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture(autouse=True)
def buffers_for_a_half(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other test has a cache whose layers make buffers, which are too small for it in all tiny models."""
    if zlib.crc32(request.node.nodeid.encode()) % 2:
        monkeypatch.setattr(layer, "SMALL", 0)


@pytest.fixture(scope="module", autouse=True)
def no_looking_at_what_stays() -> Iterator[None]:
    """Captured graphs are millions of objects, and looking for garbage among them is a quarter of the tests' time.

    So it is looked for between modules only, in what the last one made.
    """
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture
def unshared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models that are made now share no graph with one like them that another test has left."""
    monkeypatch.setattr(traces, "_KNOWN", WeakValueDictionary())


@pytest.fixture(scope="session")
def llava() -> TinyVLM:
    return family("llava")


@pytest.fixture(scope="session")
def llava_qwen2() -> TinyVLM:
    return family("llava_qwen2")
