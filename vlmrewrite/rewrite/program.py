"""A program: a captured graph with its anatomy, and, once rewritten, its plan and what each pass said."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from vlmrewrite.analysis import Anatomy, LayerCost, as_cast, costs, of_last_column
from vlmrewrite.errors import noted
from vlmrewrite.markup import Shown
from vlmrewrite.ops import Run, cut
from vlmrewrite.plan import FEATURES, Call, Outcome, Plan, Selection, TokenCounts, describe, dispatched, events
from vlmrewrite.rewrite.dispatch import Dispatch, chosen_by
from vlmrewrite.rewrite.legalize import Rewritten
from vlmrewrite.rewrite.verifier import cone_of, propagate_fakes
from vlmrewrite.text import byte_size, span, table


def _places(x: Tensor) -> Tensor:
    """The numbers of the tokens [..., C], [..., 1]."""
    return torch.arange(x.shape[:-1].numel(), device=x.device).view(*x.shape[:-1], 1)


def _taking(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Of a graph whose result takes some tokens of a tensor, the same for the tokens' numbers, and all of these."""
    (node,) = gm.graph.output_node().all_input_nodes
    with gm.graph.inserting_before(node):
        places = gm.graph.call_function(_places, (x := node.all_input_nodes[0],))
    node.replace_input_with(x, places)
    gm.graph.output_node().args = ((node, places),)
    gm.recompile()
    return gm


@dataclass(frozen=True)
class RunResult:
    """What came out of a run.

    Attributes:
        plan: the plan that was followed; of a dispatch, the most demanding one that a row followed.
        out: the captured outputs.
        chosen: which vision tokens each selection chose, bool [F], in rows that followed a plan with it.
        value: what the chooser of a dispatch read in the graph, or None.
        runs: of a dispatch, the plans that ran, in order.
    """

    plan: Plan
    out: Any
    chosen: dict[Selection, Tensor]
    value: Tensor | None = None
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Program(Shown):
    """A captured, possibly rewritten forward of a model with its images encoded.

    Attributes:
        captured: the graph as it was captured.
        anatomy: facts about it.
        plan: what each layer does.
        variants: what legalize made of it: nothing yet, one graph, or of a dispatch one for each of its plans.
        dispatch: these graphs cut where the plans part, or None.
        outcomes: what each pass said.
        call: the call it was captured from, or None.
        inputs: the captured graph's flat inputs of that call.
        seconds: time spent, by stage.
        parameters: for each input that is a decoder layer's parameter, the layer and the name within it.
        blocks: modules of the plan's trained blocks, by name.
        model: what blocks are made for, or None.
    """

    captured: torch.fx.GraphModule
    anatomy: Anatomy
    plan: Plan
    variants: tuple[Rewritten, ...] = ()
    dispatch: Dispatch | None = None
    outcomes: tuple[Outcome, ...] = ()
    call: Call | None = None
    inputs: tuple[Any, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, tuple[int, str]] = field(default_factory=dict)
    blocks: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    model: nn.Module | None = None

    def vision_mask(self, *inputs: Any) -> Tensor:
        """The mask of all vision tokens, bool [B, T], for the captured graph's flat inputs."""
        masks = self.vision_masks(*inputs)
        return functools.reduce(operator.or_, masks)  # type: ignore[no-any-return]

    @functools.cached_property
    def vision_masks(self) -> torch.fx.GraphModule:
        """The part of the graph that computes the masks of vision tokens, bool [B, T], one for each merge."""
        return cone_of(self.captured, *(merge.mask for merge in self.anatomy.merges))

    @functools.cached_property
    def picks(self) -> list[tuple[str, torch.fx.GraphModule]]:
        """What takes some features before a merge, in order: of which modality, and the part of the graph of it.

        It computes the places that are taken, and all, int64 [..., 1] both.
        """
        return [(m.modality, _taking(cone_of(self.captured, node))) for m in self.anatomy.merges for node in m.picks]

    def lacking(self, missing: Mapping[str, str]) -> Program:
        """The program without passes, for calls that lack some of the plan's FEATURES, with the reasons."""
        plan, here = self.plan, frozenset(FEATURES) - missing.keys()
        return replace(self, plan=Plan(plan.depth, here, dict(missing), plan.owners, plan.kinds))

    @functools.cached_property
    def of_last(self) -> tuple[frozenset[int], list[int]]:
        """The layers of :func:`vlmrewrite.analysis.of_last_column`, and places of the inputs that have to be 1 for it.

        Nothing, unless the last layer is one of them.
        """
        found = of_last_column(self.anatomy)
        counts = found.get(self.plan.depth - 1)
        if counts is None:
            return frozenset(), []
        inputs = self.captured.graph.find_nodes(op="placeholder")
        layers = frozenset(layer for layer, own in found.items() if own <= counts)
        return layers, [i for i, node in enumerate(inputs) if node in counts]

    def reads_last(self, inputs: Sequence[Any]) -> bool:
        """Whether the last column is all that is read behind the decoder, given the captured graph's flat inputs."""
        layers, counts = self.of_last
        return bool(layers) and all(inputs[i] == 1 for i in counts)

    @functools.cached_property
    def needs(self) -> set[str]:
        """What the plan's policies and edits ask for."""
        return self.plan.needs()

    @property
    def graph_module(self) -> torch.fx.GraphModule:
        """The graph; printable and runnable. Of a dispatch, the first plan's."""
        return self.variants[0].graph_module if self.variants else self.captured

    @property
    def graphs(self) -> tuple[torch.fx.GraphModule, ...]:
        """What runs: the graph, or of a dispatch the head and the tails."""
        return (self.graph_module,) if self.dispatch is None else (self.dispatch.head, *self.dispatch.tails)

    def arguments(self, inputs: Sequence[Any], call: Call, variant: int = 0) -> list[Any]:
        """A rewritten graph's inputs: the captured ones and what the host adds. The head takes those of the first."""
        return [*inputs, *map(call.fill, self.variants[variant].extras if self.variants else ())]

    def execute(self, parts: Sequence[Callable[..., Any]], inputs: Sequence[Any], call: Call) -> RunResult:
        """Run :attr:`graphs`, or what they were lowered to, on the captured graph's flat inputs.

        Of a dispatch: run what the plans share, ask the chooser, and run one tail after another, each for the rows that
        want it, until it is content with all.

        Raises:
            ValueError: the chooser chose none of the plans.
        """
        first, *tails = map(noted(self.about), parts)
        out = first(*self.arguments(inputs, call))
        if self.dispatch is not None:
            return self._dispatched(tails, inputs, call, out)
        if not self.variants:
            return RunResult(self.plan, out, {})
        return RunResult(self.plan, out[0], dict(zip(self.variants[0].selections, out[1], strict=True)))

    def _dispatched(
        self, tails: Sequence[Callable[..., Any]], inputs: Sequence[Any], call: Call, shared: Sequence[Any]
    ) -> RunResult:
        """Run the tails on what the head made."""
        chooser, n, rows, parted = self.plan.chooser, len(tails), len(call.vision), self.dispatch
        assert chooser is not None and parted is not None
        value = None if chooser.op is None else shared[0]
        wanted = chooser.first(value, call.with_images, n) if call.follows is None else call.follows
        if wanted is None and getattr(chooser, "running", False):
            wanted = call.begins.variant if call.begins is not None else 0
        first = parted.each(chooser, wanted, rows)
        waiting, runs, kept = dict(enumerate(first)), list[Run](), list[tuple[Run, Any, Any]]()
        while waiting:
            tried = min(waiting.values())
            mine = [row for row, i in waiting.items() if i == tried]
            given, some = self.given(inputs, call, shared, tried, mine)
            out, selected = tails[tried](*given)
            logits = out[self.anatomy.logits]
            column = (some.last - (some.length - logits.shape[1])).clamp(min=0)  # they may be of the last tokens only
            last = logits.take_along_dim(column[..., None], 1)[:, 0]
            another = None if call.follows is not None else chooser.then(tried, last, some.with_images, n)
            found = [tried] * len(mine) if another is None else parted.each(chooser, another, len(mine))
            runs.append(Run(tried, mine, [row for row, i in zip(mine, found, strict=True) if i == tried]))
            if runs[-1].kept:
                kept.append((runs[-1], out, selected))
            waiting |= zip(mine, found, strict=True)
            waiting = {row: i for row, i in waiting.items() if row not in runs[-1].kept}
            del out, selected, given, some, logits, last  # their memory is the next one's
        plan = self.plan.variants[max(run.variant for run, *_ in kept)]
        out = parted.joined([(run, out) for run, out, _ in kept], shared)
        chosen = [(run, dict(zip(self.variants[run.variant].selections, x, strict=True))) for run, _, x in kept]
        return RunResult(plan, out, chosen_by(chosen, call), value, tuple(runs))

    def given(
        self, inputs: Sequence[Any], call: Call, shared: Sequence[Any], variant: int, rows: list[int]
    ) -> tuple[list[Any], Call]:
        """What the tail of a variant is given for some rows of a call, and the call of these rows.

        Args:
            inputs: the captured graph's flat inputs.
            call: the call.
            shared: what the head made.
            variant: which one.
            rows: ascending.
        """
        assert self.dispatch is not None
        takes = [shared[k] for k in self.dispatch.takes[variant]]
        if len(rows) < len(call.vision):
            at, cuts = torch.tensor(rows, device=call.vision.device), self.dispatch.cuts[variant]
            tokens = call.tokens_of(at).nonzero()[:, 0]
            inputs, takes = (
                [cut(x, along, at, tokens) for x, along in zip(given, of, strict=True)]
                for given, of in ((inputs, cuts[: len(inputs)]), (takes, cuts[len(inputs) :]))
            )
            call = call.of_rows(at)
        return [*self.arguments(inputs, call, variant), *takes], call

    def about(self, said: str) -> list[str]:
        """Which policies and edits, of which passes, an error is in that names operators, as ``vlm.name.default``."""
        passes = ", ".join(o.configuration for o in self.outcomes if o.changed)
        return [f"in the {who}, under {passes}" for who, x, *_ in self.plan.asks() if str(x.op) in said]

    def run(self, *inputs: Any, call: Call | None = None) -> tuple[Any, tuple[Tensor, ...]]:
        """Run the graph on flat captured inputs (by default those it was captured from).

        Returns:
            the captured outputs, and which vision tokens each selection of the plan kept, bool [F] each.

        Raises:
            ValueError: the program has no inputs of its own, or a call is missing for the inputs given.
        """
        inputs, call = inputs or self.inputs, call or self.call
        if not inputs or call is None:
            raise ValueError("expected the flat inputs of the captured graph and the Call that describes them")
        result = self.execute([as_cast(gm) for gm in self.graphs], inputs, call)
        return result.out, tuple(result.chosen.values())

    def propagate(self) -> None:
        """Check the rewritten graphs on fake tensors, if the call is known.

        Raises:
            ValueError: a node does not take its inputs, or holds another number of tokens than its set.
        """
        call = self.call
        for i, rewritten in enumerate(self.variants):
            if call is not None:
                given = self.arguments(self.inputs, call, i)
                propagate_fakes(self.anatomy, rewritten, given, call.counts.size)

    def apart(self, call: Call) -> list[float]:
        """FLOPs of each plan of a dispatch in a call, behind the layer where they part."""
        each = (costs(self.anatomy, plan, call.counts, call.past) for plan in self.plan.variants)
        return [float(sum(cost.flops for cost in found[self.plan.parts_at :])) for found in each]

    def costs(self, counts: TokenCounts, past: int = 0, held: Sequence[int] = ()) -> list[LayerCost]:
        """Tokens, FLOPs and K/V bytes of each layer in a call; see :func:`vlmrewrite.analysis.costs`."""
        return costs(self.anatomy, self.plan, counts, past, held)

    def __str__(self) -> str:
        """The layer-level listing of all plans: who was refused, sets, shapes, and costs if a call is known."""
        a, plan = self.anatomy, self.plan
        head = f"program: {len(a.layers)} decoder layers, hidden {a.hidden}, {str(a.dtype).removeprefix('torch.')}"
        told = [f"REFUSED {o.configuration}: {o.reason}" for o in self.outcomes if o.reason is not None]
        told += [f"CHANGES NOTHING: {o.configuration}" for o in self.outcomes if not o.changed and o.reason is None]
        if self.call is None:
            attending = [x for x in a.layers if x.kind == "attention"]
            shapes = {f"attention: q {x.heads}x{x.head_size}, k, v {x.kv_heads}x{x.value_size}": x for x in attending}
            return "\n".join([head, *told, str(plan), *shapes])
        counts = self.call.counts
        if plan.variants:
            each = (str(replace(self, plan=variant, outcomes=())).partition("\n")[2] for variant in plan.variants)
            return "\n".join([f"{head}; {describe(counts)}", *told, *dispatched(plan, each)])
        per_layer = self.costs(counts, self.call.past)
        rows = [["layers", "run on", "attend to", "tokens", "keys", "q", "k, v", "GFLOP", "K/V"]]
        for alike, group in groupby(per_layer, lambda c: (*plan.layers[c.index].sets(), c.flops, c.kv_bytes)):
            run, keys, mlp, flops, size = alike
            cost, *more = group
            layer, layers = a.layers[cost.index], span([c.index for c in (cost, *more)])
            q, kv = f"{layer.heads}x{layer.head_size}", f"{layer.kv_heads}x{layer.value_size}"
            q, kv = (q, kv) if layer.kind == "attention" else (layer.kind, "")
            where = plan.render(run) + f", MLP {plan.render(mlp)}" * (mlp != run)
            rows.append([layers, where, plan.render(keys), str(cost.run), str(cost.keys), q, kv,
                         f"{flops / 1e9:.4g}", byte_size(size)])  # fmt: skip
        flops, kv_bytes = sum(c.flops for c in per_layer), sum(c.kv_bytes for c in per_layer)
        total = f"total: {flops / 1e9:.4g} GFLOP, K/V {byte_size(kv_bytes)}"
        return "\n".join([f"{head}; {describe(counts)}", *told, *events(plan), *table(rows), total])
