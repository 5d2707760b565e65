"""Which tokens of a prompt's images a recipe keeps before the decoder, for engines that run the rest themselves.

In: vision features and a recipe. Out: kept indices, positions and counts of each image, by the operators of the
recipe's own passes and with the budgets that a rewritten model gives them. No engine is known here, and no model.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmrewrite.plan import (
    NEEDS,
    Extra,
    Pass,
    Plan,
    Selection,
    Text,
    TokenCounts,
    TokenSet,
    Vision,
    run_passes,
    substitute,
)
from vlmrewrite.recipe import Recipe
from vlmrewrite.serving.facts import Facts, call_of, checked_grids

AVAILABLE = frozenset({"features", "ordinal", "grid", "frames", "frame", "lengths"})
"""The needs of policies that are there before the decoder runs, whatever stands in the prompt around the images."""


@dataclass(frozen=True)
class PassRuns:
    """What of a pass runs before the decoder.

    Attributes:
        name: of the pass's class.
        reason: why nothing of it runs there, or None.
        stages: selections of it that run there.
        left_out: what else it does, inside the decoder, which is left out; empty if nothing.
        vision: the vision tokens that are left behind it.
    """

    name: str
    reason: str | None
    stages: int
    left_out: str
    vision: TokenSet

    def told(self, tokens: int) -> str:
        """In one line, with how many of an image's tokens are left behind it."""
        if self.reason is not None:
            return f"{self.name}: refused: {self.reason}"
        image = TokenCounts(tokens + 1, (1,), (tokens,), (0,), (0,), padded=False)
        kept = f"{image.per_image(self.vision)[0][0]} of {tokens}"
        if not self.left_out:
            return f"{self.name}: {kept}"
        stages = "stage 1" if self.stages == 1 else f"stages 1 to {self.stages}"
        return f"{self.name}: {stages} only, {kept}; left out: {self.left_out}"


class Kept(NamedTuple):
    """What is kept of an image, both int64 [k], ascending, where the features are.

    Attributes:
        indices: of the image's N tokens.
        positions: where these stand in the prompt in which no token is left out.
    """

    indices: Tensor
    positions: Tensor


_SMALLER = "it makes pictures smaller by way of the processor: give the engine what recipe.processor(processor) returns"


def what_runs(recipe: Any, *, depth: int) -> list[PassRuns]:
    """Which passes of a recipe can run before the decoder, in order, and of the others why not.

    Those that choose by features, by places in an image or by its number, for all layers alike; of one whose later
    selections are others, what is before these.

    Args:
        recipe: as :func:`vlmrewrite.apply` takes it, without trained blocks.
        depth: number of decoder layers.

    Raises:
        ValueError, FileNotFoundError: it is no recipe, or names a layer that is not there.
    """
    given, found = Recipe.of(recipe), list[PassRuns]()
    given.check_layers(depth)
    missing = {"encoder_features": "before the decoder an engine has what the projector gave, not what it took"}
    plan = Plan(depth, frozenset({"grid"}), missing)
    for p in given.passes:
        plan, runs = _run(plan, p)
        found.append(runs)
    return found


def _run(plan: Plan, p: Pass) -> tuple[Plan, PassRuns]:
    """What of a pass runs, and the plan in which nothing else of it is left."""
    name, before = type(p).__name__, plan.layers[0].run_set
    new, [outcome] = run_passes(plan, [p])
    late = [s for s in new.selections() if _inside(s)]
    early = [s for s in new.selections() if s not in plan.selections() and s not in late]
    sets = [entry.sets() for entry in new.layers]
    for s in reversed(late):
        sets = [tuple(substitute(x, s, s.source) for x in each) for each in sets]
    kept = sets[0][0]
    told, outside = "; ".join(filter(None, map(_inside, late))), _SMALLER if hasattr(p, "processor") else None
    reason = outside or outcome.reason or _beyond(new, sets) or (told if late and not early else None)
    if reason is not None:
        return plan, PassRuns(name, reason, 0, "", before.vision_part())
    for entry in new.layers:
        entry.run_on(kept).attend_to(kept)
    return new, PassRuns(name, None, len(early), told, kept.vision_part())


def _inside(s: Selection) -> str | None:
    """Why a selection cannot be made before the decoder, or None."""
    who = f"policy {s.policy.name!r} at layer {s.at}"
    if s.at > 0:
        return f"{who} chooses inside the decoder"
    for need in s.policy.needs:
        if need not in AVAILABLE:
            return f"{who} needs {need!r} ({NEEDS[need].what}), which is not known before the decoder"
    return f"{who} reads parameters of its own, which an engine does not hold" if s.policy.weights else None


def _beyond(plan: Plan, sets: Sequence[tuple[TokenSet, ...]]) -> str | None:
    """What a plan does but choose tokens for all layers alike, or None; ``sets`` are those of each layer."""
    if plan.variants:
        return f"it chooses among {len(plan.variants)} plans at layer {plan.parts_at}, inside the decoder"
    for edit in plan.edits:
        return f"edit {edit.name!r} at layer {edit.at} changes hidden states inside the decoder"
    for branch in plan.branches:
        return f"a branch takes tokens out of layers {branch.leave}-{branch.rejoin - 1}, inside the decoder"
    for i, (run, keys, mlp) in enumerate(sets):
        if not run == keys == mlp == sets[0][0]:
            return f"layer {i} runs on {run} and attends to {keys}; expected the same tokens in all layers"
    return None


class BeforeDecoder:
    """What a recipe does before the decoder, for all prompts of an engine.

    Attributes:
        recipe: the recipe.
        passes: what of each of its passes runs.
        vision: the vision tokens that it keeps, as a set.
        by_image: whether what is kept of an image depends on it alone, so that a cache of encoded images can hold it.
        by_row: whether a budget is of all images of a prompt together.
        needs_grids: whether a pass asks for the rows and columns of an image's tokens.
    """

    def __init__(self, recipe: Any, *, depth: int) -> None:
        """Read a recipe.

        Args:
            recipe, depth: as for :func:`what_runs`.

        Raises:
            ValueError, FileNotFoundError: as :func:`what_runs`; or nothing of some of its passes can run before the
                decoder: one line for each of these.
        """
        self.recipe, self.passes = Recipe.of(recipe), tuple(what_runs(recipe, depth=depth))
        if refused := [f"{p.name}: {p.reason}" for p in self.passes if p.reason is not None]:
            raise ValueError("\n".join(refused))
        self.vision: TokenSet = self.passes[-1].vision if self.passes else Vision
        plan = Plan(1)
        plan.layers[0].run_on(Text | self.vision)
        self._selections = plan.selections()
        self.by_row = any(s.per == "row" for s in self._selections)
        self.by_image = not self.by_row and not any("ordinal" in s.policy.needs for s in self._selections)
        self.needs_grids = any("grid" in s.policy.needs for s in self._selections)

    def told(self, tokens: int) -> list[str]:
        """A line for each pass, with how many tokens of an image of so many are left behind it."""
        return [p.told(tokens) for p in self.passes]

    def counts(self, lengths: Sequence[int], places: Sequence[int | Tensor] | None = None) -> list[int]:
        """How many tokens of each image of a prompt are kept, before its images are encoded.

        Args:
            lengths: tokens of each image, N.
            places: as for :meth:`choose`.

        Raises:
            ValueError: the places are wrong; or the numbers depend on which tokens are chosen, as with ``per="row"``
                and several images.
        """
        call, _ = call_of(lengths, places, torch.device("cpu"))
        if call is None:
            return [0] * len(lengths)
        each, exact = call.counts.per_image(self.vision)
        if not exact:
            raise ValueError(
                f"how many tokens of each image {self.vision} keeps is known only when they are chosen; expected passes"
                " whose budgets are of each image"
            )
        ends, found = [*accumulate(lengths)], [0] * len(lengths)
        for start, n in zip([0, *accumulate(call.counts.images)], each, strict=False):
            found[bisect_right(ends, start)] += n
        return found

    @torch.no_grad()
    def choose(
        self,
        features: Tensor | Sequence[Tensor],
        *,
        places: Sequence[int | Tensor] | None = None,
        grids: Sequence[tuple[int, int]] | None = None,
        earlier: int = 0,
    ) -> list[Kept]:
        """What is kept of each image of a prompt, whose last token is taken to be text.

        Args:
            features: what enters the decoder, [I, N, C], or of each image [N, C], of one dtype and device.
            places: where each image stands in the prompt: the position of its first token, or int64 [N], those of all,
                where others stand between them: what these cut is an image of its own for a budget, as it is under
                transformers. None: one behind the other from 0, each with a budget of its own.
            grids: rows and columns of each image's tokens, where a pass asks for them.
            earlier: how many images of the prompt come before these, for passes that go by an image's number.

        Raises:
            ValueError: features, places or grids do not fit, or a pass does not choose what it is asked for.
        """
        each = list(features)
        if any(x.dim() != 2 for x in each):
            raise ValueError(f"features: expected [N, C] of each image, got {[tuple(x.shape) for x in each]}")
        lengths = [len(x) for x in each]
        call, at = call_of(lengths, places, each[0].device if each else torch.device("cpu"))
        if call is None:
            return [Kept(x, x) for x in at]
        if self.needs_grids:
            call.grids = checked_grids(grids, lengths, call.counts)
        whole, chosen = torch.cat(each), dict[Selection, Tensor]()
        for s in self._selections:
            facts = Facts(call, whole, s.per, earlier)
            member = call.members(s.source, chosen)[call.vision]
            given = member, call.fact("lengths", s.per), call.fill(Extra("keep", s, s.per))
            inputs = [NEEDS[need].make(facts) for need in s.policy.needs]
            made = s.policy.op(*inputs, *given, *s.policy.options)
            chosen[s] = torch.ops.vlm.checked.default(made, *given, s.policy.name)
        kept = call.members(self.vision, chosen)[call.vision].split(lengths)
        indices = [x.nonzero()[:, 0] for x in kept]
        return [Kept(i, x[i]) for i, x in zip(indices, at, strict=True)]
