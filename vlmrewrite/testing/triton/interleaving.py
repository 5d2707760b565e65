"""Programs of a Triton kernel, interpreted in turns.

The interpreter runs one program of a launch after another, so a program that waits for another one waits for ever, and
a kernel that is wrong unless its programs run in order looks right.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
from triton.runtime import interpreter as stock

PATIENCE = 500
"""Turns for each program, with nothing written in any of them, after which all are taken to wait for ever."""

OFTEN = 0.1
"""The share of plain loads and stores before which another program gets its turn."""


class _AbandonedError(BaseException):
    """Ends the programs that are left when one has failed."""


class _Launch:
    """The programs of one launch: threads, of which one runs at a time."""

    now: ClassVar[_Launch | None] = None

    def __init__(self, program: Callable[[], object], grid: tuple[int, ...], rng: random.Random) -> None:
        self.program, self.rng = program, rng
        self.at = list(itertools.product(*map(range, grid)))
        self.left = list(range(len(self.at)))
        self.turns = [threading.Semaphore(0) for _ in self.at]
        self.done = threading.Semaphore(0)
        self.runs = self.idle = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        """Run all programs to their ends.

        Raises:
            InterpreterError: one of them failed, or none went on.
        """
        if not self.left:
            return
        threads = [threading.Thread(target=self._run, args=(i,), daemon=True) for i in self.left]
        for thread in threads:
            thread.start()
        _Launch.now = self
        try:
            self._give(self.rng.choice(self.left))
            self.done.acquire()
        finally:
            _Launch.now = None
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise stock.InterpreterError(repr(self.error)) from self.error

    def _run(self, i: int) -> None:
        self.turns[i].acquire()
        try:
            if self.error is None:
                with np.errstate(all="ignore"):
                    self.program()
        except _AbandonedError:
            pass
        except BaseException as error:
            self.error = self.error or error
        self.left.remove(i)
        self.idle = 0
        if self.left:
            self._give(self.rng.choice(self.left))
        else:
            self.done.release()

    def _give(self, i: int) -> None:
        self.runs = i
        stock.interpreter_builder.set_grid_idx(*self.at[i])
        self.turns[i].release()

    def turn(self) -> None:
        """Give the next turn to any program; return when this one has a turn again."""
        me, other = self.runs, self.rng.choice(self.left)
        if other != me:
            self._give(other)
            self.turns[me].acquire()
        if self.error is not None:
            raise _AbandonedError

    def waited(self) -> None:
        """Note that the running program did something that changes nothing."""
        self.idle += 1
        if self.idle > PATIENCE * len(self.left):
            raise RuntimeError(f"{len(self.left)} of {len(self.at)} programs wait for something that none of them does")


@contextlib.contextmanager
def interleaved(seed: int) -> Iterator[None]:
    """Interpret the programs of every launch in turns, so that kernels whose programs wait for each other can run.

    One program runs at a time. Before each atomic operation and volatile load, and before some other loads and stores,
    the turn goes to a program chosen at random. All programs of a launch are resident at once.

    Args:
        seed: of the choice; the same seed gives the same order.

    Raises:
        InterpreterError: raised by the launch if a program fails, or if the programs wait for something that none of
            them does.
    """
    rng, builder, executor = random.Random(seed), stock.InterpreterBuilder, stock.GridExecutor
    launch = executor.__call__
    names = "create_atomic_rmw", "create_atomic_cas", "create_masked_load", "create_masked_store"
    rmw, cas, load, store = originals = [getattr(builder, name) for name in names]

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        grid, fn = self.grid, self.fn

        def programs(named: dict[str, Any]) -> tuple[int, ...]:  # called where the loop over the grid would begin
            size = tuple(grid(named) if callable(grid) else grid)
            size += (1,) * (3 - len(size))
            stock.interpreter_builder.set_grid_dim(*size)
            _Launch(functools.partial(fn, **named), size, rng).run()
            return (0,)  # and none is left for that loop

        self.grid = programs
        return launch(self, *args, **kwargs)

    def atomic(original: Callable[..., Any], ptr: int, mask: int | None) -> Callable[..., Any]:
        def run(self: Any, *args: Any) -> Any:
            if (running := _Launch.now) is None:
                return original(self, *args)
            running.turn()
            to, kind = args[ptr].data, stock._get_np_dtype(args[ptr].get_element_ty())
            where = np.ones(to.shape, bool) if mask is None else args[mask].data
            look = functools.partial(stock._interpreter.load, to, where, np.zeros(to.shape, kind), kind)
            before = look()
            out = original(self, *args)
            if np.array_equal(before, look()):
                running.waited()
            else:
                running.idle = 0
            return out

        return run

    def masked_load(self: Any, *args: Any, **kwargs: Any) -> Any:
        volatile = kwargs.get("is_volatile", args[-1])
        if (running := _Launch.now) is not None:
            if volatile:
                running.waited()
            if volatile or rng.random() < OFTEN:
                running.turn()
        return load(self, *args, **kwargs)

    def masked_store(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (running := _Launch.now) is not None:
            running.idle = 0
            if rng.random() < OFTEN:
                running.turn()
        return store(self, *args, **kwargs)

    executor.__call__ = call
    for name, new in zip(names, (atomic(rmw, 1, 3), atomic(cas, 0, None), masked_load, masked_store), strict=True):
        setattr(builder, name, new)
    try:
        yield
    finally:
        executor.__call__ = launch
        for name, old in zip(names, originals, strict=True):
            setattr(builder, name, old)
