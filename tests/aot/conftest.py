"""Graphs as Inductor would get them."""

import pytest


@pytest.fixture
def as_they_are(monkeypatch):
    """The graphs that Inductor would get, run without it: what is captured and how it is wired."""
    monkeypatch.setattr("vlmrewrite.lower.pieces.inductor", lambda gm: gm)
