"""The plan: per decoder layer, which tokens it runs on and which it attends to. Passes change it, legalize rewrites.

The vocabulary: ``run_on``, ``attend_to`` and ``mlp_on`` of a layer, ``narrow`` (a selection and its use from a layer
on), ``edit`` (an operator on the stream at one layer's entry), ``branch`` (tokens that leave the stream, go through a
block and rejoin) and ``block`` (trained parameters that an edit, a policy or a branch reads).
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial, reduce

from vlmrewrite.markup import Shown
from vlmrewrite.plan.blocks import Block, LayerCopy
from vlmrewrite.plan.budget import Budget, Depth, Per, layer_index
from vlmrewrite.plan.listing import labels, listing
from vlmrewrite.plan.needs import FEATURES, NEEDS
from vlmrewrite.plan.substitution import as_of, check_order, narrowed, selections, substitute
from vlmrewrite.plan.tokens import Nothing, Selection, TokenSet, has_text
from vlmrewrite.plan.vocabulary import Branch, Chooser, Edit, LayerPlan, Policy


@dataclass
class Plan(Shown):
    """What every decoder layer does; made from the anatomy of a captured model, changed by passes.

    It is made before the images are counted: it does not know how many there are, nor how large.

    Args:
        depth: number of decoder layers.
        features: which of :data:`FEATURES`, the needs that not every model can give, policies and edits can ask for. A
            pass that asks for another one is refused.
        refusals: for those that are missing, the reason.
        owners: for each layer, the one whose keys and values it attends to; none: each its own.
        kinds: of the layers whose tokens do not meet by attention alone, see :attr:`vlmrewrite.analysis.Layer.kind`.
    """

    depth: int
    features: frozenset[str] = frozenset()
    refusals: dict[str, str] = field(default_factory=dict)
    owners: tuple[int, ...] = ()
    kinds: dict[int, str] = field(default_factory=dict)
    layers: list[LayerPlan] = field(init=False)
    edits: list[Edit] = field(init=False, default_factory=list)
    branches: list[Branch] = field(init=False, default_factory=list)
    blocks: dict[str, Block] = field(init=False, default_factory=dict)
    label: str = field(init=False, default="block")
    said: list[str] = field(init=False, default_factory=list)
    chooser: Chooser | None = field(init=False, default=None)
    variants: tuple[Plan, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        self.layers = [LayerPlan(i) for i in range(self.depth)]
        self._share_keys()

    def _share_keys(self) -> None:
        for entry, owner in zip(self.layers, self.owners, strict=False):
            entry.owner = None if owner == entry.index else self.layers[owner]

    def copy(self) -> Plan:
        """A plan that can be changed without changing this one."""
        new = copy.copy(self)
        new.layers = [replace(entry) for entry in self.layers]
        new._share_keys()
        new.edits, new.branches, new.said = list(self.edits), list(self.branches), list(self.said)
        new.blocks, new.variants = dict(self.blocks), tuple(v.copy() for v in self.variants)
        return new

    def layer(self, at: Depth) -> LayerPlan:
        """The layer at an index (int) or a fraction of the depth (float).

        Raises:
            ValueError: there is no such layer.
        """
        return self.layers[layer_index(at, self.depth)]

    def vision(self, at: Depth = 0) -> TokenSet:
        """The vision tokens that layer ``at`` or a later one, or a branch that leaves there, still needs.

        What a later one will select is not known yet at layer ``at``: it counts as what is selected from.
        """
        first = layer_index(at, self.depth)
        sets = [s for e in self.layers[first:] for s in (e.run_set, e.run_set if e.owner else e.keys)]
        sets += [b.tokens for b in self.branches if b.leave >= first]
        return as_of(reduce(operator.or_, sets).vision_part(), first)

    def exhausted(self, at: Depth = 0) -> str | None:
        """The reason to refuse a pass that wants vision tokens from layer ``at`` on where none are left, or None."""
        if self.vision(at) != Nothing:
            return None
        return f"an earlier pass leaves no vision tokens from layer {layer_index(at, self.depth)} on"

    def narrow(self, policy: Policy, keep: Budget, at: Depth = 0, per: Per = "image") -> TokenSet:
        """From layer ``at`` on, go on with ``keep`` vision tokens of each image, chosen by ``policy`` of what is left.

        Of each frame, or of a row, if that is what ``per`` says; see :meth:`TokenSet.select`.

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
            self.layers[layer].told = True
            return left
        chosen = left.select(policy, keep, at=layer, per=per)
        change = partial(narrowed, left=left, chosen=chosen)
        for entry in self.layers[layer:]:
            entry.change(change)
        self.edits = [replace(e, tokens=change(e.tokens)) if e.at >= layer else e for e in self.edits]
        self.branches = [replace(b, tokens=change(b.tokens)) if b.leave >= layer else b for b in self.branches]
        return chosen

    def widen(self, tokens: TokenSet, added: TokenSet, at: int) -> TokenSet:
        """From layer ``at`` on, go on with ``added`` wherever ``tokens`` are meant; returns both together."""
        wider = tokens | added
        for entry in self.layers[at:]:
            entry.change(lambda s: substitute(s, tokens, wider))
        return wider

    def edit(self, edit: Edit) -> None:
        """Replace the hidden states of some tokens at a layer's entry; see :class:`Edit`.

        Raises:
            ValueError: there is no such layer, or it names a block that is not there.
        """
        layer_index(edit.at, self.depth)
        for name in edit.weights:
            if name.partition(".")[0] not in self.blocks:
                raise ValueError(f"edit {edit.name!r} reads {name!r}; expected one of the blocks {list(self.blocks)}")
        self.edits.append(edit)

    def block(self, block: Block, part: str = "") -> str:
        """Give the plan trained parameters of its own.

        Returns:
            the block's name, for :class:`Edit`, :class:`Policy` and :meth:`branch`: the pass's name,
            numbered if the recipe has several, and ``part``.
        """
        name = f"{self.label}_{part}" if part else self.label
        if name in self.blocks:
            raise ValueError(f"there is a block {name!r} already; give each of a pass's blocks a part name of its own")
        self.blocks[name] = block
        return name

    def dispatch(self, chooser: Chooser, plans: Sequence[Plan]) -> None:
        """Choose among whole plans for each row at run time; what later passes say, they say to each of them.

        Args:
            chooser: who chooses, and at the entry of which layer.
            plans: the plans, cheapest first, made from copies of this one; alike before the chooser's layer.

        Raises:
            ValueError: there are fewer than two, they differ before that layer, or one dispatches itself.
        """
        at = layer_index(chooser.at, self.depth)
        if len(plans) < 2 or self.variants or any(p.variants for p in plans):
            raise ValueError(f"dispatch expects two plans or more that do not dispatch themselves, got {len(plans)}")
        for p in plans:
            if p.until(at) != plans[0].until(at):
                raise ValueError(f"the plans of a dispatch at layer {at} differ before it:\n{plans[0]}\nand\n{p}")
        self.chooser, self.variants = chooser, tuple(plans)
        self.blocks = reduce(operator.or_, (p.blocks for p in plans), self.blocks)
        for p in plans:
            p.chooser, p.blocks = chooser, dict(self.blocks)

    def until(self, layer: int) -> tuple[object, ...]:
        """What it says about the layers before one."""
        edits = tuple(e for e in self.edits if e.at < layer)
        branches = tuple(b for b in self.branches if b.leave < layer)
        return tuple(entry.sets() for entry in self.layers[:layer]), edits, branches

    def branched(self, leave: Depth, rejoin: int) -> str | None:
        """The reason to refuse a branch that would cross another one, or None."""
        first = layer_index(leave, self.depth)
        for b in self.branches:
            if first < b.rejoin and b.leave < rejoin:
                return f"a branch from layer {first} to {rejoin} would cross the one from {b.leave} to {b.rejoin}"
        return None

    def branch(self, tokens: TokenSet, leave: Depth, rejoin: int, block: LayerCopy | None = None) -> Branch:
        """Take vision tokens out of layers ``leave`` .. ``rejoin`` - 1 and through a block of their own; see Branch.

        Args:
            tokens: a set of vision tokens.
            leave: the first layer without them.
            rejoin: the layer at whose entry they are back, ``leave`` or later; the plan's depth: behind the last.
            block: the block, or None for none.

        Raises:
            ValueError: the set holds text, the layers are not in order, or another branch is open there.
        """
        first = layer_index(leave, self.depth)
        if has_text(tokens) or tokens == Nothing:
            raise ValueError(f"branch expects a set of vision tokens, got {tokens}")
        if not first <= rejoin <= self.depth:
            raise ValueError(f"a branch that leaves at layer {first} rejoins at {first} .. {self.depth}, got {rejoin}")
        if crossed := self.branched(first, rejoin):
            raise ValueError(crossed)
        name = None if block is None else self.block(block)
        made = Branch(tokens, first, rejoin, name, first if block is None else block.layer)
        for entry in self.layers[first:rejoin]:
            entry.change(lambda s: s - tokens)
        self.branches.append(made)
        return made

    def sets(self) -> list[TokenSet]:
        """The distinct sets that layers, edits and branches name, in order of use."""
        return list(dict.fromkeys(tokens for _, tokens, _ in self._uses()))

    def _uses(self) -> Iterator[tuple[str, TokenSet, int]]:
        """Where it names a set, in words, the set, and the layer whose entry that is."""
        for entry in self.layers:
            yield from ((f"layer {entry.index}", s, entry.index) for s in entry.sets())
        yield from ((f"edit {e.name!r} at layer {e.at}", e.tokens, e.at) for e in self.edits)
        yield from ((f"the branch from layer {b.leave}", b.tokens, b.leave) for b in self.branches)

    def selections(self) -> list[Selection]:
        """All selections in order of the layer they happen at, sources first."""
        found = dict.fromkeys(s for entry in self.sets() for s in selections(entry))
        return sorted(found, key=lambda s: (s.at, len(selections(s))))

    @property
    def parts_at(self) -> int | None:
        """The layer at whose entry the plans of a dispatch part, or None without one."""
        return None if self.chooser is None else layer_index(self.chooser.at, self.depth)

    @property
    def judges_logits(self) -> bool:
        """Whether a dispatch chooses by logits, and not by something in the graph."""
        return self.chooser is not None and self.chooser.op is None

    @property
    def reads_last(self) -> bool:
        """Whether something in the graph is read at the last prompt token."""
        asked = any(NEEDS[need].scores is not None for need in self.needs())
        return asked or (self.chooser is not None and self.chooser.op is not None)

    def scored(self, at: int) -> list[TokenSet]:
        """The keys that the last prompt token is scored against at a layer's entry, once for each time it is."""
        asked = [(tokens, n) for _, x, tokens, layer in self.asks() if layer == at for n in x.needs]
        return [score(tokens) for tokens, n in asked if (score := NEEDS[n].scores) is not None]

    def asks(self) -> list[tuple[str, Policy | Edit, TokenSet, int]]:
        """Its policies and edits and those of its variants: which one, in words, for which tokens, at which layer."""
        own = [(f"policy {s.policy.name!r} at layer {s.at}", s.policy, s.source, s.at) for s in self.selections()]
        edits = [(f"edit {e.name!r} at layer {e.at}", e, e.tokens, e.at) for e in self.edits]
        return sum((v.asks() for v in self.variants), [*own, *edits])

    @property
    def keyless(self) -> frozenset[int]:
        """The layers that keep no keys."""
        return frozenset(i for i, kind in self.kinds.items() if kind != "indexed")

    def needs(self) -> set[str]:
        """What its policies and edits ask for."""
        return {need for _, x, *_ in self.asks() for need in x.needs}

    def unmet(self) -> str | None:
        """The first policy or edit that asks for what is not in ``features``, with the reason; or None."""
        made, lacking = f"the plan was made with features={sorted(self.features)}", {*FEATURES} - self.features
        asked = ((who, n) for who, x, *_ in self.asks() for n in x.needs if n in lacking)
        told = (f"{who} needs {n!r}, which is not there: {self.refusals.get(n, made)}" for who, n in asked)
        return next(told, None)

    def render(self, s: TokenSet) -> str:
        """The set's expression with selections by their short names."""
        return s.expression(labels(self))

    def check(self) -> None:
        """Raise ValueError for a plan that has no meaning, or asks for what is not there."""
        if unmet := self.unmet():
            raise ValueError(unmet)
        for variant in self.variants:
            variant.check()
        for use in self._uses():
            check_order(*use)

    def __str__(self) -> str:
        return listing(self)
