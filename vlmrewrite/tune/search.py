"""The search: Optuna's TPE draws shapes, the budget fixes their amounts, and few of them see all prompts.

Candidates are told apart by the KL of the first token, on a few prompts first. Of those that were there so far, the
best third goes on to three times as many (successive halving, Jamieson and Talwalkar 2016, arXiv 1502.07943, as Li et
al. have it without waiting, arXiv 1810.05934). TPE (Bergstra et al. 2011, NeurIPS 24) takes choices that depend on one
another, which is what recipes are made of, and learns from runs that were cut off.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from vlmrewrite.tune.prompts import Prompts
from vlmrewrite.tune.space import Solved, Space, solve
from vlmrewrite.tune.wish import Wish

FIRST = 16
"""Prompts that every candidate sees."""

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


def rungs(sizes: list[int]) -> list[int]:
    """Batches after which candidates are compared: enough for :data:`FIRST` prompts, three times as many, ..., all."""
    first = next((i for i in range(1, len(sizes) + 1) if sum(sizes[:i]) >= FIRST), len(sizes))
    found = [first]
    while found[-1] * _FACTOR < len(sizes):
        found.append(found[-1] * _FACTOR)
    return found if found[-1] == len(sizes) else [*found, len(sizes)]


def search(
    prompts: Prompts, space: Space, wish: Wish, trials: int, seed: int, progress: Callable[[int], None]
) -> list[Candidate]:
    """The candidates that saw all prompts and then the others, each by KL; no recipe stands there twice.

    Args:
        prompts: what candidates are run on.
        space: where they come from.
        wish: the budget.
        trials: how many are drawn.
        seed: of the drawing.
        progress: called with the number of trials that are done.
    """
    module, steps = optuna(), rungs(prompts.sizes)
    found = dict[str, Candidate]()
    with _quiet(module):
        study = module.create_study(
            sampler=module.samplers.TPESampler(seed=seed, n_startup_trials=min(40, trials // 4), constant_liar=False),
            pruner=module.pruners.SuccessiveHalvingPruner(steps[0], _FACTOR),
        )
        for params in space.simple():
            study.enqueue_trial(params)
        for number in range(trials):
            progress(number)
            trial = study.ask()
            shape = space.draw(trial)
            solved = None if shape is None else solve(shape, prompts, wish.counted, wish.share)
            if solved is None:
                study.tell(trial, state=module.trial.TrialState.PRUNED)
                continue
            name = repr(solved.passes)
            kl, run = list(found[name].kl) if name in found else [], prompts.runner(solved.passes)
            value = float("inf")
            for start, stop in zip([0, *steps], steps, strict=False):
                seen = sum(prompts.sizes[:stop])
                if len(kl) < seen:
                    kl += run(start, stop)
                value = sum(kl[:seen]) / seen
                trial.report(value, stop)
                if stop < len(prompts.sizes) and trial.should_prune():
                    study.tell(trial, state=module.trial.TrialState.PRUNED)
                    break
            else:
                study.tell(trial, value)
            found[name] = Candidate(number, solved, tuple(kl))
    return sorted(found.values(), key=lambda c: (-len(c.kl), c.mean, c.number))


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
