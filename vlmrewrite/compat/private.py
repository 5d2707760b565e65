"""How a private interface is found, and the error where there is none."""

from __future__ import annotations

import contextlib
import importlib
import operator
from collections.abc import Iterator
from typing import Any

TESTED = {"torch": ">=2.11,<2.14", "transformers": ">=5.23,<5.24", "triton": ">=3.6,<3.10"}
"""The versions that the tests pass with, as in pyproject.toml."""


BESIDE = {"vllm": ">=0.32,<0.33"}
"""Versions of what is no dependency: it is beside vlmrewrite where somebody put it there."""


class VersionError(RuntimeError):
    """Something private that is needed is not in the installed version of a library, or the library is not there."""


def lacking(package: str, what: str | None = None) -> VersionError:
    """The error that a package, as it is installed, does not have something; None: that it is not installed."""
    bounds = (TESTED | BESIDE)[package]
    try:
        found = f"{package} {getattr(importlib.import_module(package), '__version__', 'of an unknown version')}"
    except ImportError:
        needed = "" if what is None else f", and {what} is needed"
        return VersionError(f"{package} is not installed{needed}: install {package}{bounds}")
    return VersionError(f"{found} has no {what} as vlmrewrite needs it: install {package}{bounds}")


def find(module: str, name: str) -> Any:
    """What a module calls so.

    Raises:
        VersionError: there is no such module, or no such name in it.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise lacking(module.partition(".")[0], f"{module}.{name}") from error


def attribute(of: Any, path: str, package: str) -> Any:
    """An attribute, or one of an attribute.

    Raises:
        VersionError: there is none.
    """
    try:
        return operator.attrgetter(path)(of)
    except AttributeError as error:
        kind = of if isinstance(of, type) else type(of)
        raise lacking(package, f"{kind.__name__}.{path}") from error


@contextlib.contextmanager
def patched(module: str, **options: Any) -> Iterator[None]:
    """Other values of a module's names while the block runs.

    Raises:
        VersionError: it lacks one.
    """
    before = {name: find(module, name) for name in options}
    config = importlib.import_module(module)
    try:
        for name, value in options.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)
