"""Graphs as Inductor would get them."""

import pytest

from tests.caches import GIVEN, behind
from vlmrewrite.lower import decode_step
from vlmrewrite.runtime import executables


@pytest.fixture
def as_they_are(monkeypatch):
    """The graphs that Inductor would get, run without it: what is captured and how it is wired."""
    monkeypatch.setattr("vlmrewrite.lower.pieces.inductor", lambda gm: gm)


@pytest.fixture
def seen(monkeypatch):
    """What each decode step is given, which runs as it would be given to Inductor; prefills run without a compiler."""
    monkeypatch.setattr(decode_step, "behind", behind)
    monkeypatch.setattr(executables, "resolve", lambda *_: "eager")
    GIVEN.clear()
    return GIVEN
