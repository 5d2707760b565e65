"""A bar on stderr while something takes long, by the means of the Hub's client, whose switches turn it off too."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import huggingface_hub.utils

hub: Any = huggingface_hub.utils

_GROUP = "vlmrewrite"

PATIENCE = 2.0
"""Seconds that something may take before there is a bar."""

_QUIET = ContextVar("vlmrewrite_quiet", default=False)

_BETWEEN = 1.0
"""Seconds between two looks at the clock, of which whole seconds are shown."""


def disable_progress_bars() -> None:
    """Show no bar while a model is captured, its graph rewritten or compiled.

    ``HF_HUB_DISABLE_PROGRESS_BARS=1``, and ``disable_progress_bars`` of ``huggingface_hub`` and of ``transformers``,
    turn these bars off with all others.
    """
    hub.disable_progress_bars(_GROUP)


def enable_progress_bars() -> None:
    """Show a bar again while one of these takes more than two seconds, which is so to begin with."""
    hub.enable_progress_bars(_GROUP)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """While the block runs, and once it has run for :data:`PATIENCE` seconds, show ``what`` and for how long."""
    if _QUIET.get() or hub.are_progress_bars_disabled(_GROUP):
        yield
        return
    ended = threading.Event()
    shown = threading.Thread(target=_show, args=(what, time.time(), ended), daemon=True, name="vlmrewrite-progress")
    shown.start()
    try:
        yield
    finally:
        ended.set()
        shown.join()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Show none of these bars while the block runs, in this context: another one is shown."""
    token = _QUIET.set(True)
    try:
        yield
    finally:
        _QUIET.reset(token)


def _show(what: str, begun: float, ended: threading.Event) -> None:
    if ended.wait(PATIENCE):
        return
    bar: Any = _Bar(desc=what, bar_format="{desc} [{elapsed}]", leave=False, delay=1e-9, name=_GROUP)
    bar.start_t = begun
    with bar:
        bar.refresh()
        while not ended.wait(_BETWEEN):
            bar.refresh()


# without the thread that tqdm starts for all its bars, which stays
_Bar: Any = type("_Bar", (hub.tqdm,), {"monitor_interval": 0})
