"""The words of a plan: what is said of a layer, a selection, an edit, a branch and a choice among plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from vlmrewrite.plan.budget import Depth
from vlmrewrite.plan.needs import operator_of
from vlmrewrite.plan.tokens import All, Text, TokenSet


class Begin(NamedTuple):
    """With which plan a call begins, of a dispatch whose chooser leaves it to what earlier calls showed; and why."""

    variant: int
    why: str


class Chooser(Protocol):
    """Who chooses among the plans of a dispatch for each row, in each call with an image.

    What it says of a row must come from that row alone. Where rows cannot be run apart, the largest number holds for
    all.

    One that is trained may have a method ``loss(value, right)``: a scalar that is added to the model's loss in calls
    with labels, from what ``op`` returned for rows with labels and an image, and how many of their labels each plan
    predicts, int64 [b, C].

    One that leaves it to earlier calls with which plan a call begins has ``running``, True.

    Attributes:
        at: the layer at whose entry the plans part.
        op: called as ``op(hidden, *weights)`` with the last prompt token's hidden states at that point [B, 1, H], or
            None if nothing is read there.
        weights: parameters that ``op`` wants, as ``block.parameter``.
    """

    @property
    def at(self) -> Depth:
        """The layer."""

    @property
    def op(self) -> Callable[..., Any] | None:
        """What reads the stream there."""

    @property
    def weights(self) -> tuple[str, ...]:
        """Its parameters."""

    def first(self, value: Tensor | None, images: Tensor, variants: int) -> Tensor | int | None:
        """Which variant to run, of each row, int64 [B], or one for all; None: the one that a call begins with.

        Args:
            value: what ``op`` returned.
            images: rows that have an image, bool [B].
            variants: how many there are.
        """

    def then(self, tried: int, logits: Tensor, images: Tensor, variants: int) -> Tensor | int | None:
        """Which variant to run instead of the one that was tried, ``tried`` where its result is kept.

        Of each row that it was run for, int64 [b], or one for all of them; None: all keep it.

        Args:
            tried: the variant that was run last.
            logits: of each of these rows' last prompt token, [b, V].
            images: which of them have an image, bool [b].
            variants: how many there are.
        """


@dataclass
class LayerPlan:
    """What one decoder layer does.

    Attributes:
        index: the layer, from 0.
        run_set: tokens whose queries, MLP and residual update are computed. The others bypass the layer.
        attend_set: tokens whose keys and values the queries see and the cache keeps; None: those it runs on.
        mlp_set: of the tokens it runs on, those that go through its second half, the MLP; None: all of them.
        owner: the earlier layer whose keys and values it attends to, whatever is said to it; None: its own.
        told: whether anything was said to it since the plan was copied, be it what it did already.
    """

    index: int
    run_set: TokenSet = All
    attend_set: TokenSet | None = None
    mlp_set: TokenSet | None = None
    owner: LayerPlan | None = None
    told: bool = field(init=False, default=False, compare=False)

    @property
    def keys(self) -> TokenSet:
        """Tokens whose keys and values this layer attends to."""
        if self.owner is not None:
            return self.owner.keys
        return self.run_set if self.attend_set is None else self.attend_set

    def run_on(self, tokens: TokenSet) -> LayerPlan:
        """Compute this layer for ``tokens`` only.

        Raises:
            ValueError: the set does not hold all text tokens.
        """
        self.run_set = self._with_text("run_on", tokens)
        self.mlp_set = None if self.mlp_set is None else self._in_run_set(self.mlp_set)
        return self

    def attend_to(self, tokens: TokenSet) -> LayerPlan:
        """Let this layer's queries see the keys of ``tokens`` only; they need not be tokens that it runs on.

        Raises:
            ValueError: the set does not hold all text tokens.
        """
        self.attend_set = None if self._with_text("attend_to", tokens) == self.run_set else tokens
        return self

    def mlp_on(self, tokens: TokenSet) -> LayerPlan:
        """Compute the half of the layer behind the attention's residual add for ``tokens`` only, of those it runs on.

        Raises:
            ValueError: the set does not hold all text tokens.
        """
        self.mlp_set = self._in_run_set(self._with_text("mlp_on", tokens))
        return self

    def change(self, change: Callable[[TokenSet], TokenSet]) -> LayerPlan:
        """Change what it runs on, and what it attends to and takes through the MLP where that is something else."""
        keys, mlp = self.attend_set, self.mlp_set
        self.run_on(change(self.run_set))
        if keys is not None:
            self.attend_to(change(keys))
        return self if mlp is None else self.mlp_on(change(mlp))

    def _in_run_set(self, tokens: TokenSet) -> TokenSet | None:
        found = tokens & self.run_set
        return None if found == self.run_set else found

    def _with_text(self, word: str, tokens: TokenSet) -> TokenSet:
        if tokens.text_part() != Text:
            raise ValueError(f"layer {self.index}: {word} expects a set with all text tokens, got {tokens}")
        self.told = True
        return tokens

    def sets(self) -> tuple[TokenSet, ...]:
        """What it runs on, attends to, and takes through the MLP."""
        return self.run_set, self.keys, self.run_set if self.mlp_set is None else self.mlp_set


@dataclass(frozen=True)
class Policy:
    """How a selection chooses: an operator over an image's vision tokens.

    Args:
        name: what listings call it.
        op: called as ``op(*inputs, member, lengths, keep, *weights, *options)`` with ``member`` bool [F] (which of the
            call's F vision tokens are left), ``lengths`` int64 [I] (tokens of each image, on the CPU) and ``keep``
            int64 [I] (how many to choose of each, on the CPU); returns the chosen ones as bool [F].
        needs: the inputs it wants, keys of :data:`NEEDS`.
        options: further arguments of ``op``.
        weights: parameters it wants, as ``block.parameter``.
    """

    name: str
    op: Callable[..., Any]
    needs: tuple[str, ...] = ()
    options: tuple[Any, ...] = ()
    weights: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = *self.needs, "member", "lengths", "keep", *self.weights, *self.options
        object.__setattr__(self, "op", operator_of(f"policy {self.name!r}", self.op, self.needs, *given))


@dataclass(frozen=True)
class Edit:
    """An operator on the stream at the entry of layer ``at``, behind the selections that happen there.

    Args:
        name: what listings call it.
        tokens: the tokens whose hidden states it replaces.
        op: called as ``op(hidden, index, valid, *inputs, *weights, *options)`` with hidden [B, n, H] and the set's
            index int64 and valid bool, [B, n]; returns the new hidden states [B, n, H].
        at: the layer.
        needs: inputs it wants, as for :class:`Policy`.
        weights: parameters it wants, as ``block.parameter``.
        options: further arguments.
    """

    name: str
    tokens: TokenSet
    op: Callable[..., Any]
    at: int
    needs: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    options: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        given = "hidden", "index", "valid", *self.needs, *self.weights, *self.options
        object.__setattr__(self, "op", operator_of(f"edit {self.name!r}", self.op, self.needs, *given))


@dataclass(frozen=True)
class Branch:
    """Tokens that leave the stream at the entry of layer ``leave`` and are back at the entry of layer ``rejoin``.

    In between they go once through what layer ``layer`` does, with the parameters of ``block`` in place of the
    layer's own, and see one another only; without a block they come back as they left.
    """

    tokens: TokenSet
    leave: int
    rejoin: int
    block: str | None = None
    layer: int = 0
