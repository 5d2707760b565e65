"""What is searched: recipes of at most three passes, each drawn but for one amount, which the budget fixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlmrewrite.plan import Pass
from vlmrewrite.registry import usable_passes
from vlmrewrite.report import LayerProfile

NONE = "none"
SLOTS = ("start", "later", "layers")
"""Which tokens enter the decoder, which of them go on from some layer, and what layers do with these."""

_STEPS = 1000
"""Amounts of a pass that are told apart."""

_TRIED = 3 * _STEPS
"""Amounts of a recipe that are told apart."""


@dataclass(frozen=True)
class Shape:
    """A recipe but for its amount.

    Attributes:
        build: the passes for an amount in (0, 1].
        drawn: what was drawn, by name.
    """

    build: Callable[[float], tuple[Pass, ...]]
    drawn: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Solved:
    """A recipe whose cost lies within a budget.

    Attributes:
        passes: its passes.
        shares: what it costs, as shares of the unmodified model's: ``flops`` and ``kv``.
        shape: what it was made from.
    """

    passes: tuple[Pass, ...]
    shares: dict[str, float]
    shape: Shape


class Drawing:
    """A :class:`vlmrewrite.draw.Draw` over a trial of Optuna."""

    def __init__(self, trial: Any, profile: LayerProfile, slot: str) -> None:
        self.depth, self.freeze, self.hide = profile.depth, profile.freeze_kl, profile.hide_kl
        self.key_share = profile.key_share
        self._trial, self._slot, self._first = trial, slot, int(slot.startswith("later"))

    def layer(self, name: str, first: int = 0) -> int:
        """A layer from ``first`` on; of what goes on later, not the first layer of all."""
        low = min(max(first, self._first), self.depth - 1)
        return int(self._drawn(self._trial.suggest_int, name, low, self.depth - 1))

    def share(self, name: str, low: float = 0.0, high: float = 1.0) -> float:
        """A number in between."""
        return float(self._drawn(self._trial.suggest_float, name, low, high))

    def pick(self, name: str, options: Sequence[Any]) -> Any:
        """One of some values."""
        return options[self._drawn(self._trial.suggest_categorical, name, range(len(options)))]

    def _drawn(self, suggest: Callable[..., Any], name: str, *given: Any) -> Any:
        try:
            return suggest(f"{self._slot} {name}", *given)
        except RuntimeError as e:  # Optuna's, of a trial that is finished
            raise RuntimeError(
                f"pass {self._slot.split()[-1]}: tuned() drew {name!r} for some amounts alone: expected it to draw the"
                f" same options for each amount ({e})"
            ) from e


class Space:
    """All recipes that are searched on a model."""

    def __init__(self, profile: LayerProfile) -> None:
        self.profile = profile
        known, _ = usable_passes()
        self.passes = {slot: {n: c for n, c in known.items() if slot in getattr(c, "tunes", ())} for slot in SLOTS}
        self.controls = {n: c for n, c in known.items() if getattr(c, "control", False)}
        self.planned = [n for n, c in self.controls.items() if not hasattr(c, "processor")]

    def simple(self) -> list[dict[str, Any]]:
        """Recipes of one pass each, by which a search begins."""
        each = [(slot, name) for slot in SLOTS for name in self.passes[slot]]
        return [dict.fromkeys(SLOTS, NONE) | {slot: name} for slot, name in each]

    def draw(self, trial: Any) -> Shape | None:
        """A shape; None for the unmodified model."""
        names = {slot: trial.suggest_categorical(slot, [NONE, *self.passes[slot]]) for slot in SLOTS}
        chosen = {slot: self.passes[slot][name] for slot, name in names.items() if name != NONE}
        if not chosen:
            return None
        drawn = dict.fromkeys(chosen, 0.0)  # nothing is fixed of the first that is there
        if {"start", "later"} <= chosen.keys():
            drawn["later"] = trial.suggest_float("later of start", 0.05, 1.0)
        if len(chosen) > 1 and "layers" in chosen:
            drawn["layers"] = trial.suggest_float("layers amount", 0.1, 1.0)
        draws = {slot: Drawing(trial, self.profile, f"{slot} {names[slot]}") for slot in chosen}

        def build(amount: float) -> tuple[Pass, ...]:
            amounts = spread(amount, drawn)
            return tuple(cls.tuned(_rounded(amounts[slot]), draws[slot]) for slot, cls in chosen.items())

        return Shape(build, names)

    def control(self, name: str) -> Shape:
        """A control that keeps a share of the tokens."""
        return Shape(lambda amount: (self.controls[name](keep=_rounded(amount)),), {"control": name})


def spread(amount: float, drawn: dict[str, float]) -> dict[str, float]:
    """The amounts of a recipe's passes, none of which falls as ``amount`` rises; at 1 all are 1.

    Over the first part of (0, 1] the amount of the first pass rises to 1; that of ``later`` is the share of it that was
    drawn, that of ``layers`` as drawn. Then, if the recipe still costs less than it may, these rise to 1 in turn.

    Args:
        amount: in (0, 1].
        drawn: of each pass, by slot and in order; the first one's is not read.
    """
    first, *others = drawn
    at = amount * len(drawn)
    lead = min(1.0, at)
    found = {first: lead}
    for i, slot in enumerate(others, 1):
        base = drawn[slot] * (lead if slot == "later" else 1.0)
        found[slot] = base + (1 - base) * min(1.0, max(0.0, at - i))
    return found


def _rounded(amount: float) -> float:
    return min(1.0, max(1, round(_STEPS * amount)) / _STEPS)


def solve(shape: Shape, prompts: Any, kind: str, share: float) -> Solved | None:
    """The recipe of a shape that costs most within a budget; None if it has none.

    Args:
        shape: whose cost rises with its amount.
        prompts: :class:`vlmrewrite.tune.prompts.Prompts`, for costs.
        kind: ``"flops"`` or ``"kv"``.
        share: of the unmodified model's.
    """

    def within(step: int, all_of_them: bool = False) -> Solved | bool:
        """Whether it costs no more; where it has no meaning, it is too small to have one."""
        try:
            passes = prompts.effective(shape.build(step / _TRIED))
            shares = prompts.shares(passes, all_of_them)
        except ValueError:
            return True
        if shares is None:
            return True
        return shares[kind] <= share and Solved(passes, shares, shape)

    def last(low: int, high: int, all_of_them: bool) -> int:
        """The last that is within, of what starts with one that is and ends before one that is not."""
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if within(middle, all_of_them) else (low, middle)
        return low

    low, step = last(0, _TRIED + 1, False), 1
    if low and not within(low, True):
        low = last(0, low, True)
    elif low:
        while low + step <= _TRIED and within(low + step, True):
            low, step = low + step, 2 * step
        low = last(low, min(low + step, _TRIED + 1), True)
    for step in range(low, max(0, low - 60), -1):
        found = within(step, all_of_them=True)
        if isinstance(found, Solved):
            return found
    return None
