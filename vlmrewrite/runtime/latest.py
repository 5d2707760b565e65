"""Which call is the last one, in a process with several threads."""

from __future__ import annotations

import threading
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from vlmrewrite.runtime.facts import LastCall


class Latest:
    """The last call of a session, as each thread is told of it; see :func:`vlmrewrite.kept_tokens`."""

    def __init__(self) -> None:
        self._of_thread: WeakKeyDictionary[threading.Thread, list[Any]] = WeakKeyDictionary()
        self._any: LastCall | None = None
        self._lock = threading.Lock()

    def of_this_thread(self) -> LastCall | None:
        """What the thread that asks is told."""
        return self._of_thread.get(threading.current_thread(), (self._any,))[0]

    def add(self, ran: LastCall) -> None:
        """Let a call be the latest, but for threads that made theirs when this one ran beside them already."""
        me = threading.current_thread()
        with self._lock:
            for told in (x for x in self._of_thread.values() if me not in x[1]):
                told[0] = ran
            self._of_thread[me], self._any = [ran, WeakSet(threading.enumerate())], ran
