"""A run that the processes of a group share, as ``torchrun`` and ``accelerate launch`` start them; or one alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


class Together:
    """The processes of torch.distributed's default group, or this one alone.

    Attributes:
        rank: of this process, from 0.
        count: how many there are.
    """

    def __init__(self) -> None:
        grouped = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if grouped else 0
        self.count = dist.get_world_size() if grouped else 1

    def each(self, make: Callable[[], T]) -> list[T]:
        """What every process makes, in order of rank; in all of them.

        Raises:
            Exception: this process's own.
            RuntimeError: another one failed.
        """
        if self.count == 1:
            return [make()]
        mine, failed = None, None
        try:
            mine = make()
        except Exception as e:
            failed = e
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, (mine, failed and f"{type(failed).__name__}: {failed}"))
        if failed is not None:
            raise failed
        if wrong := [f"process {rank}: {why}" for rank, (_, why) in enumerate(found) if why]:
            raise RuntimeError("\n".join(wrong))
        return [made for made, _ in found]

    def agreed(self, make: Callable[[], T]) -> T:
        """What this process makes, once every process has made its own.

        Raises:
            Exception, RuntimeError: as :meth:`each`.
        """
        made = list[T]()
        self.each(lambda: made.append(make()))
        return made[0]

    def same(self, what: dict[str, Any]) -> None:
        """Check that all processes were given the same.

        Raises:
            ValueError: they were not.
        """
        given = self.each(lambda: what)
        if other := [key for key in what if any(x.get(key) != what[key] for x in given)]:
            told = "; ".join(f"{key}: {', '.join(repr(x.get(key)) for x in given)}" for key in other)
            raise ValueError(f"expected the same in each of the {self.count} processes, got {told}")
