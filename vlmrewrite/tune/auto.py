"""The recipe that ``apply(model, "auto", calibration=...)`` stands for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from vlmrewrite.errors import shown
from vlmrewrite.evaluate import FEW
from vlmrewrite.recipe import Recipe
from vlmrewrite.tune.prompts import Prompts
from vlmrewrite.tune.run import candidates, tune
from vlmrewrite.tune.search import optuna
from vlmrewrite.tune.space import solve
from vlmrewrite.tune.wish import Wish

BUDGET = {"flops": 0.5}
TRIALS = 100

_EXPECTED = (
    "calibration=(processor, data), with data as vlmrewrite.evaluate takes it, or calibration=inputs, what the model's"
    " forward takes, or a list of these"
)


def automatic(model: nn.Module, calibration: Any, budget: str | Mapping[str, float] | None) -> Recipe:
    """The best recipe within a budget; a control, if that is as good.

    Args:
        model: unmodified.
        calibration: a processor and data, for :func:`vlmrewrite.tune`; or inputs with images, by the first half of
            which a recipe is searched, and by the second half it is compared with the controls, both by KL.
        budget: as for :func:`vlmrewrite.tune`; None: half of the FLOPs.

    Raises:
        ValueError: there is nothing to search on; or as :func:`vlmrewrite.tune`.
    """
    budget = BUDGET if budget is None else budget
    if calibration is None:
        raise ValueError(f"the recipe 'auto' is searched: expected {_EXPECTED}")
    if isinstance(calibration, tuple) and len(calibration) == 2 and not isinstance(calibration[0], Mapping):
        found = tune(model, *calibration, budget, None, trials=TRIALS)
        if not found.met:
            warnings.warn(found.verdict, stacklevel=3)
        return found.best
    batches = [calibration] if isinstance(calibration, Mapping) else calibration
    if not isinstance(batches, Sequence) or not batches or not all(isinstance(x, Mapping) for x in batches):
        raise ValueError(f"calibration: expected {_EXPECTED}, got {shown(calibration)}")
    optuna()
    return _by_kl(model, batches, Wish.of(budget))


def _by_kl(model: nn.Module, batches: Sequence[Mapping[str, Any]], wish: Wish) -> Recipe:
    if wish.kind == "latency":
        raise ValueError("budget latency: expected calibration=(processor, data), with which answers can be timed")
    everything = [dict(batch) for batch in batches]
    half = (len(everything) + 1) // 2
    searched = Prompts(model, everything[:half])
    judges = Prompts(model, everything[half:]) if everything[half:] else searched
    number = sum(searched.sizes) + (0 if judges is searched else sum(judges.sizes))
    if number < FEW or judges is searched:
        told = "one batch, which searches and judges" if judges is searched else f"{number} prompts"
        warnings.warn(f"calibration: {told}: expected at least {FEW} prompts in two batches or more", stacklevel=4)
    space, found, _ = candidates(searched, wish, TRIALS, 0, lambda *_: None)
    best = found[0].solved
    controls = [solve(space.control(name), searched, wish.counted, wish.share) for name in space.planned]
    rivals = [best, *(x for x in controls if x is not None)]

    def kl(passes: Any) -> float:
        return sum(judges.runner(passes)(0, len(judges.sizes))) / sum(judges.sizes)

    loss = {i: kl(x.passes) for i, x in enumerate(rivals)}
    taken = min(loss, key=lambda i: (loss[i], i == 0))  # a control wins ties
    cost = f"{wish.counted} {rivals[taken].shares[wish.counted]:.3f}"
    told = f"KL of the first token {loss[taken]:.3g} on {sum(judges.sizes)} prompts, at {cost}"
    return Recipe(name=f"auto-{wish.kind}-{wish.share:g}", description=told, passes=rivals[taken].passes)
