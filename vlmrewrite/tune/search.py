"""The search: Optuna's TPE draws shapes, the budget fixes their amounts, and few of them see all prompts.

Candidates are told apart by the KL of the first token, on a few prompts first. Of those that were there so far, the
best third goes on to three times as many (successive halving, Jamieson and Talwalkar 2016, arXiv 1502.07943, as Li et
al. have it without waiting, arXiv 1810.05934). TPE (Bergstra et al. 2011, NeurIPS 24) takes choices that depend on one
another, which is what recipes are made of, and learns from runs that were cut off.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

from vlmrewrite.tune.prompts import Prompts
from vlmrewrite.tune.space import Solved, Space, solve
from vlmrewrite.tune.wish import Wish

FIRST = 48
"""Prompts that every candidate sees. On the digits model, KL on so many ranks recipes as accuracy on 192 does (Spearman
0.84 for 60 random recipes at 1/8 of the FLOPs; with all 192 0.87), and KL on 16 does not (0.17)."""

PROFILED = 16
"""Prompts that layers are profiled on."""

FINALISTS = 6
"""Recipes that see all prompts at least, and answer them."""

_FACTOR = 3


@dataclass(frozen=True)
class Candidate:
    """A recipe that was run.

    Attributes:
        number: of the trial.
        solved: the recipe and what it costs.
        kl: of the first token to the unmodified model, nats, for each prompt that it saw.
    """

    number: int
    solved: Solved
    kl: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of the KL."""
        return sum(self.kl) / len(self.kl)


def optuna() -> ModuleType:
    """The module.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import optuna as found
    except ImportError as e:
        raise ImportError("tune needs optuna, which is not installed: pip install 'vlmrewrite[tune]'") from e
    return found


def batches_of(sizes: list[int], prompts: int) -> int:
    """How many batches hold so many prompts; at most all."""
    return next((i for i in range(1, len(sizes) + 1) if sum(sizes[:i]) >= prompts), len(sizes))


def rungs(sizes: list[int]) -> list[int]:
    """Batches after which candidates are compared: enough for :data:`FIRST` prompts, three times as many, ..., all."""
    found = [batches_of(sizes, FIRST)]
    while found[-1] * _FACTOR < len(sizes):
        found.append(found[-1] * _FACTOR)
    return found if found[-1] == len(sizes) else [*found, len(sizes)]


def search(
    prompts: Prompts, space: Space, wish: Wish, trials: int, seed: int, progress: Callable[[int], None]
) -> tuple[list[Candidate], list[str]]:
    """The candidates that saw all prompts and then the others, each by KL, and what is wrong with those that failed.

    No recipe stands there twice.

    Args:
        prompts: what candidates are run on.
        space: where they come from.
        wish: the budget.
        trials: how many are drawn.
        seed: of the drawing.
        progress: called with the number of trials that are done.
    """
    module, steps = optuna(), rungs(prompts.sizes)
    found, failed = dict[Any, _Running](), list[str]()
    with _quiet(module):
        study = module.create_study(
            sampler=module.samplers.TPESampler(seed=seed, n_startup_trials=trials // 3, constant_liar=False),
            pruner=module.pruners.SuccessiveHalvingPruner(steps[0], _FACTOR),
        )
        for params in space.simple():
            study.enqueue_trial(params)
        for number in range(trials):
            progress(number)
            trial, value = study.ask(), None
            shape = space.draw(trial)
            solved = None if shape is None else solve(shape, prompts, wish.counted, wish.share)
            if solved is not None:
                key = _alike(solved)
                one = found.setdefault(key, _Running(number, solved, prompts))
                with _watched(one, failed):
                    value = _climbed(one, trial, steps)
                if one.failed:
                    del found[key]
            study.tell(trial, value, state=None if value is not None else module.trial.TrialState.PRUNED)
    progress(trials)
    left = list(found.values())
    for i, (stop, following) in enumerate(pairwise(steps), 1):  # early ones had few to be compared with
        left = sorted(left, key=lambda one: (one.mean(stop), one.number))[: max(FINALISTS, len(found) // _FACTOR**i)]
        for one in left:
            with _watched(one, failed):
                one.mean(following)
        left = [one for one in left if not one.failed]
    done = [one.done() for one in found.values() if not one.failed]
    return sorted(done, key=lambda c: (-len(c.kl), c.mean, c.number)), failed


def _alike(solved: Solved) -> tuple[str, float, float]:
    """The same for recipes that keep as many tokens in as many layers by the same passes, whatever share that is."""
    return re.sub(r"\d+\.\d+", "", repr(solved.passes)), solved.shares["flops"], solved.shares["kv"]


def _climbed(one: _Running, trial: Any, steps: list[int]) -> float | None:
    """The mean KL of a recipe on all prompts, or None if it was cut off before."""
    for stop in steps:
        trial.report(one.mean(stop), stop)
        if stop < steps[-1] and trial.should_prune():
            return None
    return one.mean(steps[-1])


class _Running:
    """A recipe that is run on as many batches as it is asked about."""

    def __init__(self, number: int, solved: Solved, prompts: Prompts) -> None:
        self.number, self.solved, self.failed, self._prompts = number, solved, False, prompts
        self._run: Callable[[int, int], list[float]] | None = None
        self._kl, self._batches = list[float](), 0

    def mean(self, stop: int) -> float:
        """Of the KL on the batches before one."""
        if stop > self._batches:
            self._run = self._run or self._prompts.runner(self.solved.passes)
            self._kl += self._run(self._batches, stop)
            self._batches = stop
        seen = sum(self._prompts.sizes[:stop])
        return sum(self._kl[:seen]) / seen

    def rest(self) -> None:
        """Keep no graphs."""
        self._run = None

    def done(self) -> Candidate:
        """What came of it."""
        return Candidate(self.number, self.solved, tuple(self._kl))


@contextlib.contextmanager
def _watched(one: _Running, failed: list[str]) -> Iterator[None]:
    """While the block runs it: what an operator cannot do is seen then, and said; no graphs are kept behind it."""
    try:
        yield
    except Exception as e:
        one.failed = True
        failed.append(" ".join(f"{one.solved.passes}: {e}".split()))
    finally:
        one.rest()


@contextlib.contextmanager
def _quiet(module: ModuleType) -> Iterator[None]:
    """While the block runs, Optuna logs nothing but warnings, and does not say which of its parts are new."""
    before: Any = module.logging.get_verbosity()
    module.logging.set_verbosity(module.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", module.exceptions.ExperimentalWarning)
            yield
    finally:
        module.logging.set_verbosity(before)
