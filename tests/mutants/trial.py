"""A copy of the checkout with a fault, and pytest on it in a fork of a process that has imported what takes seconds."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.mutants.faults import ROOT, Fault

HOUSE = [f"--ignore=tests/unit/{name}.py" for name in ("test_house", "test_packaging", "test_faults")]

PYTEST = [*"-x -q --no-header --tb=no -p no:cacheprovider -p no:xdist".split(), *HOUSE]

QUICKLY = ["-m", "not slow"]
"""Where tests are not named one by one: without those that take long."""

PYTEST += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # plugins are imported already

FORKS = multiprocessing.get_context("forkserver")

FAILED, PASSED, NO_TESTS, UNUSABLE = (1, 2), 0, 5, 3

TOO_LATE = "timed out"


@contextmanager
def copied(fault: Fault | None) -> Iterator[Path]:
    """A copy of the checkout, its links kept, with a fault."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    with tempfile.TemporaryDirectory(prefix="vlmrewrite-mutant-") as folder:
        copy = Path(folder).resolve()
        for name in filter(None, names):
            if os.path.lexists(ROOT / name):  # a file that is deleted but not yet so in the index
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
        if fault is not None:
            (copy / fault.file).write_text(fault.applied((copy / fault.file).read_text()))
        yield copy


def run(copy: Path, tests: Sequence[str], timeout: float, options: Sequence[str] = ()) -> str | None:
    """The first test of some that fails in a copy, :data:`TOO_LATE`, or None if all pass.

    Args:
        tests: files, folders or tests.
        timeout: seconds.
        options: more for pytest.

    Raises:
        RuntimeError: pytest could not run them.
    """
    said = copy / ".said"
    process = FORKS.Process(target=_pytest, args=(copy, said, [*options, *tests]))
    process.start()
    try:
        process.join(max(0.0, timeout))
        if process.exitcode is None:
            return TOO_LATE
    finally:
        if process.is_alive():
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)
            process.join()
    if process.exitcode in (PASSED, NO_TESTS):
        return None
    out = said.read_text()
    failed = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", out, re.MULTILINE)
    if process.exitcode not in FAILED or failed is None:
        raise RuntimeError(f"pytest ended with {process.exitcode} for {' '.join(tests)}:\n{out}")
    return failed[1]


class _Unshrunk:
    """A plugin: a property that fails is a property that fails; nobody is shown the smallest example of it."""

    def pytest_collection(self) -> None:
        from hypothesis import Phase, settings

        name = settings.get_current_profile_name()
        settings.register_profile(name, settings(), phases=[Phase.explicit, Phase.generate])
        settings.load_profile(name)


def _pytest(copy: Path, said: Path, tests: Sequence[str]) -> None:
    """In a process of its own: pytest on the copy, and on nothing of the checkout that it was copied from."""
    os.setsid()
    os.chdir(copy)
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.path[:] = [str(copy), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(copy) if not given else os.pathsep.join([str(copy), given])
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = str(copy / ".hypothesis")
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    spec, code = importlib.util.find_spec("vlmrewrite"), UNUSABLE
    if spec is not None and spec.origin == str(copy / "vlmrewrite" / "__init__.py"):
        code = int(pytest.main([*PYTEST, *tests], [_Unshrunk()]))
    else:
        print(f"expected vlmrewrite to be imported from {copy}, found {spec and spec.origin}")
    sys.stdout.flush()
    os._exit(code)
