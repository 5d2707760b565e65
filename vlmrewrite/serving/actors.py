"""Batches over the processes of a Ray cluster, each with a model of its own; one that is lost is started again."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_AGAIN = 3
"""How often an actor is started again, and a batch asked again, before the run stops."""


def ray_module() -> Any:
    """Ray.

    Raises:
        ImportError: it is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as e:
        raise ImportError("Ray is not installed: pip install 'vlmrewrite[ray]', or leave --ray out") from e


class _Worker:
    """What works in a process of the cluster."""

    def __init__(self, make: Callable[..., Callable[[Any], Any]], given: tuple[Any, ...], threads: int) -> None:
        torch.set_num_threads(threads)
        self.ask = make(*given)

    def answer(self, batch: Any) -> tuple[Any, int, list[str]]:
        """What comes of a batch, of which process, and what it warned of."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            made = self.ask(batch)
        return made, os.getpid(), [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


@contextlib.contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Ray, connected; disconnected behind the block, unless it was before."""
    ray = ray_module()
    mine = not ray.is_initialized()
    if mine:
        try:
            dashboard = False if address == "local" else None
            ray.init(address, log_to_driver=False, include_dashboard=dashboard, logging_level=logging.WARNING)
        except (ConnectionError, ValueError) as e:
            raise ValueError(f"--ray: expected 'local' or the address of a cluster, got {address!r}: {e}") from None
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()


def on_actors(
    make: Callable[..., Callable[[T], R]],
    given: tuple[Any, ...],
    batches: Iterator[T],
    *,
    address: str,
    actors: int,
    threads: int = 1,
    gpus: int = 0,
) -> Generator[tuple[R, int]]:
    """What comes of each batch and the process that did it, as they are done; of lost processes, done again.

    What processes warn of is warned of here, once.

    Args:
        make: called with ``given`` in each process; returns what is called with a batch.
        given: arguments, which are pickled for each process.
        batches: read as actors become free.
        address: of a cluster, ``"auto"``, or ``"local"``: processes of this machine, started for it.
        actors: how many processes.
        threads: of PyTorch in each, and the CPUs that it asks for.
        gpus: that each asks for.

    Raises:
        ImportError: Ray is not installed.
        ValueError: there is no cluster at the address.
        RuntimeError: processes were lost again and again; or what ``make`` or a batch raised.
    """
    with _cluster(address) as ray:
        options = {"num_cpus": threads, "num_gpus": gpus, "max_restarts": _AGAIN, "max_task_retries": _AGAIN}
        kind = ray.remote(**options)(_Worker)
        free: list[Any] = [kind.remote(make, given, threads) for _ in range(actors)]
        running, told = dict[Any, Any](), set[str]()
        while True:
            while free and (batch := next(batches, None)) is not None:
                worker = free.pop()
                running[worker.answer.remote(batch)] = worker
            if not running:
                return
            [done], _ = ray.wait([*running], num_returns=1)
            free.append(running.pop(done))
            try:
                made, process, warned = ray.get(done)
            except ray.exceptions.RayActorError as e:
                raise RuntimeError(f"processes of the cluster were lost more than {_AGAIN} times: {e}") from e
            for text in dict.fromkeys(warned):
                if text not in told:
                    warnings.warn(text, stacklevel=2)
            told |= set(warned)
            yield made, process
