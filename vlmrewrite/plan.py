"""The plan: per decoder layer, which tokens it runs on and which it attends to. Passes change it, legalize rewrites.

The vocabulary so far is ``run_on``, ``attend_to`` and ``narrow`` (a selection and its use from a layer on). Blocks on
the stream (``edit``, ``branch``) and a choice among whole plans at run time (``dispatch``) will stand beside them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby
from typing import ClassVar, Protocol, runtime_checkable

from vlmrewrite.budget import Budget, Depth, layer_index
from vlmrewrite.tokens import (
    All,
    Nothing,
    Policy,
    Selection,
    Text,
    TokenSet,
    contains,
    intersection,
    selections,
    substitute,
    text_part,
    union,
    vision_part,
)


@runtime_checkable
class Pass(Protocol):
    """A technique: a frozen dataclass whose fields are its options (see :func:`vlmrewrite.budget.frozen_pass`)."""

    name: ClassVar[str]

    def refuse(self, plan: Plan) -> str | None:
        """Why this pass cannot do its work on this plan, or None."""
        ...

    def change(self, plan: Plan) -> None:
        """Say to the plan what should happen."""
        ...


@dataclass
class LayerPlan:
    """What one decoder layer does.

    Attributes:
        index: the layer, from 0.
        run_set: tokens whose queries, MLP and residual update are computed. The others bypass the layer.
        attend_set: tokens whose keys and values the queries see and the cache keeps; None: those it runs on.
    """

    index: int
    run_set: TokenSet = All
    attend_set: TokenSet | None = None

    @property
    def keys(self) -> TokenSet:
        """Tokens whose keys and values this layer computes."""
        return self.run_set if self.attend_set is None else self.attend_set

    def run_on(self, tokens: TokenSet) -> LayerPlan:
        """Compute this layer for ``tokens`` only.

        Raises:
            ValueError: the set does not hold all text tokens.
        """
        if text_part(tokens) != Text:
            raise ValueError(f"layer {self.index}: run_on expects a set with all text tokens, got {tokens}")
        self.run_set = tokens
        return self

    def attend_to(self, tokens: TokenSet) -> LayerPlan:
        """Let this layer's queries see the keys of ``tokens`` only; they need not be tokens that it runs on.

        Raises:
            ValueError: the set does not hold all text tokens.
        """
        if text_part(tokens) != Text:
            raise ValueError(f"layer {self.index}: attend_to expects a set with all text tokens, got {tokens}")
        self.attend_set = None if tokens == self.run_set else tokens
        return self


@dataclass
class Plan:
    """What every decoder layer does; made from the anatomy of a captured model, changed by passes.

    Args:
        depth: number of decoder layers.
        features: the vision features a policy can ask for, of ``"features"`` and ``"encoder_features"``.
        refusals: for features that are missing, the reason.
    """

    depth: int
    features: frozenset[str] = frozenset({"features"})
    refusals: dict[str, str] = field(default_factory=dict)
    layers: list[LayerPlan] = field(init=False)

    def __post_init__(self) -> None:
        self.layers = [LayerPlan(i) for i in range(self.depth)]

    def copy(self) -> Plan:
        """A plan that can be changed without changing this one."""
        return copy.deepcopy(self)

    def layer(self, at: Depth) -> LayerPlan:
        """The layer at an index (int) or a fraction of the depth (float).

        Raises:
            ValueError: there is no such layer.
        """
        return self.layers[layer_index(at, self.depth)]

    def vision(self, at: Depth = 0) -> TokenSet:
        """The vision tokens that layer ``at`` or a later one still runs on or attends to."""
        later = self.layers[layer_index(at, self.depth) :]
        return reduce(union, (vision_part(s) for entry in later for s in (entry.run_set, entry.keys)))

    def exhausted(self, at: Depth = 0) -> str | None:
        """The reason to refuse a pass that wants vision tokens from layer ``at`` on where none are left, or None."""
        if self.vision(at) != Nothing:
            return None
        return f"an earlier pass leaves no vision tokens from layer {layer_index(at, self.depth)} on"

    def narrow(self, policy: Policy, keep: Budget, at: Depth = 0) -> TokenSet:
        """From layer ``at`` on, go on with ``keep`` vision tokens of each image, chosen by ``policy`` of what is left.

        Layers keep their kind: one that runs on text alone still does, one that attends to more than it runs on too.
        Selections that an earlier pass made at deeper layers then choose from these.

        Returns:
            the vision tokens that are left, the same set as before if ``keep`` is 1.0.

        Raises:
            ValueError: there is no such layer, or no vision tokens are left there (see :meth:`exhausted`).
        """
        layer = layer_index(at, self.depth)
        left = self.vision(layer)
        if left == Nothing:
            raise ValueError(f"nothing to select from: {self.exhausted(layer)}")
        if isinstance(keep, float) and keep == 1.0:
            return left
        chosen = left.select(policy, keep, at=layer)
        for entry in self.layers[layer:]:
            entry.run_set = _narrowed(entry.run_set, left, chosen)
            if entry.attend_set is not None:
                entry.attend_to(_narrowed(entry.attend_set, left, chosen))
        return chosen

    def sets(self) -> list[TokenSet]:
        """The distinct sets that layers run on or attend to, in order of use."""
        return list(dict.fromkeys(s for entry in self.layers for s in (entry.run_set, entry.keys)))

    def selections(self) -> list[Selection]:
        """All selections in order of the layer they happen at, sources first."""
        found = dict.fromkeys(s for entry in self.sets() for s in selections(entry))
        return sorted(found, key=lambda s: (s.at, len(selections(s))))

    def labels(self) -> dict[Selection, str]:
        """A short name for each selection: its policy's name, numbered if needed."""
        counts: dict[str, int] = {}
        out: dict[Selection, str] = {}
        for s in self.selections():
            counts[s.policy.name] = counts.get(s.policy.name, 0) + 1
            out[s] = s.policy.name if counts[s.policy.name] == 1 else f"{s.policy.name}{counts[s.policy.name]}"
        return out

    def render(self, s: TokenSet) -> str:
        """The set's expression with selections by their short names."""
        text = str(s)
        for selection, label in reversed(self.labels().items()):
            text = text.replace(str(selection), label)
        return text

    def check(self) -> None:
        """Raise ValueError for a plan that has no meaning."""
        for entry in self.layers:
            for s in selections(entry.run_set) + selections(entry.keys):
                if s.at > entry.index:
                    raise ValueError(f"layer {entry.index} uses {s}, which is chosen later, at layer {s.at}")

    def __str__(self) -> str:
        labels = self.labels()
        lines = [
            f"{label} = {self.render(s.source)}.select({s.policy.name}, keep={s.keep}) at layer {s.at}"
            for s, label in labels.items()
        ]
        for (run, keys), group in groupby(self.layers, key=lambda e: (e.run_set, e.keys)):
            span = [e.index for e in group]
            where = f"layer {span[0]}" if len(span) == 1 else f"layers {span[0]}-{span[-1]}"
            lines.append(
                f"{where:<14} run_on {self.render(run)}" + ("" if run == keys else f", attend_to {self.render(keys)}")
            )
        return "\n".join(lines)


def _narrowed(s: TokenSet, left: TokenSet, chosen: TokenSet) -> TokenSet:
    vision = substitute(vision_part(s), left, chosen)
    return union(text_part(s), vision if contains(chosen, vision) else intersection(vision, chosen))
