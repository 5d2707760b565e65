"""Batches over processes, with a Ray of a few lines in the place of the real one; tests/cli/test_map.py runs that."""

from __future__ import annotations

import os
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest

from vlmrewrite.serving.actors import on_actors


class Lost(Exception):
    """A process that is gone."""


class Ray:
    """One in which all is done as soon as it is asked for, and told last first."""

    exceptions = SimpleNamespace(RayActorError=Lost)

    def __init__(self, connected: bool = False) -> None:
        self.connected, self.most, self.options = connected, 0, dict[str, Any]()

    def is_initialized(self) -> bool:
        return self.connected

    def init(self, address: str, **_: Any) -> None:
        if address == "nowhere:1":
            raise ConnectionError("no answer")
        self.connected = True

    def shutdown(self) -> None:
        self.connected = False

    def remote(self, **options: Any) -> Any:
        self.options = options

        def actor(kind: Any, *args: Any) -> Any:
            made = kind(*args)
            return SimpleNamespace(answer=SimpleNamespace(remote=lambda x: (len(args), x, lambda: made.answer(x))))

        return lambda kind: SimpleNamespace(remote=lambda *args: actor(kind, *args))

    def wait(self, running: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
        self.most = max(self.most, len(running))
        return running[-1:], running[:-1]

    def get(self, ref: Any) -> Any:
        return ref[2]()


def make(name: str) -> Any:
    def ask(batch: int) -> str:
        if batch == 99:
            raise Lost("signal 9")
        if batch % 2:
            warnings.warn(f"{name} does nothing", stacklevel=2)
        return f"{name} {batch}"

    return ask


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    made = Ray()
    monkeypatch.setitem(sys.modules, "ray", made)
    monkeypatch.setattr("torch.set_num_threads", lambda n: None)  # of this process
    return made


def run(batches: Any, **how: Any) -> list[Any]:
    return [*on_actors(make, ("a",), iter(batches), **({"address": "local", "actors": 2} | how))]


def test_each_batch_once(ray: Ray) -> None:
    with pytest.warns(UserWarning, match="^a does nothing$") as caught:
        found = run(range(9), gpus=1)
    assert sorted(found) == [(f"a {i}", os.getpid()) for i in range(9)] and len(caught) == 1
    assert ray.most == 2 and not ray.connected
    assert ray.options == {"num_cpus": 1, "num_gpus": 1, "max_restarts": 3, "max_task_retries": 3}


def test_a_cluster_that_was_there_stays(ray: Ray) -> None:
    ray.connected = True
    assert run([]) == [] and run([2]) == [("a 2", os.getpid())]
    assert ray.connected


def test_what_goes_wrong(ray: Ray) -> None:
    with pytest.raises(RuntimeError, match="^processes of the cluster were lost more than 3 times: signal 9$"):
        run([2, 99])
    assert not ray.connected
    with pytest.raises(
        ValueError, match="^--ray: expected 'local' or the address of a cluster, got 'nowhere:1': no answer"
    ):
        run([2], address="nowhere:1")
