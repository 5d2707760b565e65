"""A program: a captured graph with its anatomy, and, once rewritten, its plan and what each pass said."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from vlmrewrite.analysis import Anatomy, LayerCost, analyse, costs
from vlmrewrite.errors import shown
from vlmrewrite.plan import FEATURES, Call, Chooser, Outcome, Pass, Plan, TokenCounts, build, run_passes
from vlmrewrite.rewrite.dispatch import Parted, part
from vlmrewrite.rewrite.legalize import Rewritten, legalize
from vlmrewrite.rewrite.listing import listing
from vlmrewrite.rewrite.verifier import check_sets, propagate_fakes


@dataclass(frozen=True)
class Program:
    """A captured, possibly rewritten forward of a model with its images encoded.

    Attributes:
        graph_module: the graph; printable and runnable.
        anatomy: facts about the captured graph.
        plan: what each layer does.
        outcomes: what each pass said.
        call: the call it was captured from, or None.
        inputs: the captured graph's flat inputs of that call.
        seconds: time spent, by stage.
        blocks: modules of the plan's trained blocks, by name.
        variants: for a dispatch, the programs it chooses among; the fields above are then those of the first.
        parted: for a dispatch, their graphs cut where they part.
    """

    graph_module: torch.fx.GraphModule
    anatomy: Anatomy
    plan: Plan
    captured: torch.fx.GraphModule
    rewritten: Rewritten | None = None
    outcomes: tuple[Outcome, ...] = ()
    call: Call | None = None
    inputs: tuple[Any, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, tuple[int, str]] = field(default_factory=dict)
    blocks: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    model: nn.Module | None = None
    variants: tuple[Program, ...] = ()
    parted: Parted | None = None

    def vision_mask(self) -> torch.fx.GraphModule:
        """The part of the graph that computes the vision-token mask, bool [B, T], from the same inputs."""
        graph = torch.fx.Graph()
        env: dict[torch.fx.Node, torch.fx.Node] = {}
        graph.graph_copy(self.captured.graph, env)
        graph.output(env[self.anatomy.vision])
        graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        return torch.fx.GraphModule(self.captured, graph)

    def lacking(self, missing: Mapping[str, str]) -> Program:
        """The program without passes, for calls that lack some of the plan's FEATURES, with the reasons."""
        plan = Plan(len(self.anatomy.layers), frozenset(FEATURES) - missing.keys(), dict(missing))
        return replace(self, plan=plan)

    def arguments(self, inputs: Sequence[Any], call: Call) -> list[Any]:
        """The rewritten graph's inputs: the captured ones and what the host adds."""
        extras = self.rewritten.extras if self.rewritten is not None else ()
        return [*inputs, *(call.fill(extra) for extra in extras)]

    def run(self, *inputs: Any, call: Call | None = None) -> tuple[Any, tuple[Tensor, ...]]:
        """Run the graph on flat captured inputs (by default those it was captured from).

        Returns:
            the captured outputs, and which vision tokens each selection of the plan kept, bool [F] each.

        Raises:
            ValueError: the program has no inputs of its own, or a call is missing for the inputs given.
        """
        inputs = inputs or self.inputs
        call = call or self.call
        if not inputs or call is None:
            raise ValueError("expected the flat inputs of the captured graph and the Call that describes them")
        if self.variants:
            assert self.parted is not None
            return self.dispatched(inputs, call, self.parted.head, self.parted.tails)[1]
        out = self.graph_module(*self.arguments(inputs, call))
        return out if self.rewritten is not None else (out, ())

    def costs(self, counts: TokenCounts, past: int = 0, held: Sequence[int] = ()) -> list[LayerCost]:
        """Tokens, FLOPs and K/V bytes of each layer in a call; see :func:`vlmrewrite.analysis.costs.costs`."""
        return costs(self.anatomy, self.plan, counts, past, held)

    def propagate(self) -> None:
        """Check the rewritten graph on fake tensors, if the call is known; see :mod:`vlmrewrite.rewrite.verifier`.

        Raises:
            ValueError: a node does not take its inputs, or holds another number of tokens than its set.
        """
        if self.call is not None and self.rewritten is not None:
            arguments = self.arguments(self.inputs, self.call)
            propagate_fakes(self.anatomy, self.rewritten, arguments, self.call.counts.size)

    def dispatched(
        self, inputs: Sequence[Any], call: Call, head: Callable[..., Any], tails: Sequence[Callable[..., Any]]
    ) -> tuple[tuple[Program, ...], tuple[Any, tuple[Tensor, ...]], Tensor | None]:
        """Run what the variants share, ask the chooser, and run one tail after another until it is content.

        Args:
            inputs, call: as for :meth:`run`.
            head, tails: of :attr:`parted`, lowered or not.

        Returns:
            the variants that ran, last the one whose result is kept; that result as of :meth:`run`; and what the
            chooser read in the graph.
        """
        parted, chooser, n = self.parted, self.plan.chooser, len(self.variants)
        assert parted is not None and chooser is not None
        shared = head(*inputs, *(call.fill(extra) for extra in parted.extras))
        value = None if chooser.op is None else shared[0]
        tried = _in_range(chooser.first(value, call.with_images, n), n, chooser)
        ran: list[Program] = []
        while True:
            variant = self.variants[tried]
            ran.append(variant)
            out = tails[tried](*variant.arguments(inputs, call), *(shared[k] for k in parted.takes[tried]))
            logits = out[0][self.anatomy.logits]
            column = (call.last - (call.length - logits.shape[1])).clamp(min=0)  # they may be of the last tokens only
            last = logits.take_along_dim(column[..., None], 1)[:, 0]
            another = chooser.then(tried, last, call.with_images, n)
            if another is None:
                return tuple(ran), out, value
            del out, logits  # their memory is the next one's
            tried = _in_range(another, n, chooser)

    def __str__(self) -> str:
        return listing(self)


def _in_range(i: object, n: int, chooser: Chooser) -> int:
    if type(i) is not int or not 0 <= i < n:
        raise ValueError(f"{chooser} chose variant {shown(i)}; expected an int in 0 .. {n - 1}")
    return i


def program_of(gm: torch.fx.GraphModule, features: int) -> Program:
    """Analyse a captured graph; ``features`` says which of its inputs holds the vision features.

    Raises:
        ValueError: a part could not be recognised.
    """
    start = time.perf_counter()
    anatomy = analyse(gm, features)
    plan = Plan(len(anatomy.layers), frozenset(FEATURES))
    return Program(gm, anatomy, plan, gm, seconds={"anatomy": time.perf_counter() - start})


def rewrite(
    program: Program,
    passes: Sequence[Pass] | Pass,
    *,
    strict: bool = False,
    blocks: nn.ModuleDict | None = None,
    propagate: bool = True,
) -> Program:
    """Apply passes, in order, to a program; the old program is untouched.

    Args:
        program: from :func:`vlmrewrite.trace`, or a rewritten one.
        passes: what to do.
        strict: raise when a pass is refused.
        blocks: modules of the blocks that the passes ask for, by name; without them they are made new.
        propagate: if the program holds the call that it was captured from, run the new graph on fake tensors and check
            that every node holds as many tokens as its set.

    Raises:
        ValueError: a pass is refused and ``strict`` is set, or a pass or the rewrite fails; notes name the pass.
        TypeError: something in ``passes`` is not a pass.
    """
    start = time.perf_counter()
    plan, outcomes = run_passes(program.plan, [passes] if isinstance(passes, Pass) else list(passes), strict=strict)
    planned = time.perf_counter()
    said = replace(program, plan=plan, outcomes=(*program.outcomes, *outcomes), variants=())
    try:
        modules = _modules(program, plan, blocks)
        if plan.variants:
            each = tuple(_rewritten(replace(said, plan=v), modules) for v in plan.variants)
            parted = part([v.rewritten for v in each if v.rewritten is not None])
            out = replace(each[0], plan=plan, variants=each, parted=parted)
        else:
            out = _rewritten(said, modules)
        legalized = time.perf_counter()
        for one in (out.variants or (out,)) if propagate else ():
            one.propagate()
    except Exception as e:
        e.add_note(f"while rewriting to the plan:\n{plan}")
        raise
    seconds = {"passes": planned - start, "legalize": legalized - planned, "verify": time.perf_counter() - legalized}
    return replace(out, seconds=program.seconds | seconds)


def _rewritten(program: Program, modules: nn.ModuleDict) -> Program:
    rewritten = legalize(program.captured, program.anatomy, program.plan, modules, program.parameters)
    check_sets(program.anatomy, rewritten)
    return replace(program, graph_module=rewritten.graph_module, rewritten=rewritten, blocks=modules)


def _modules(program: Program, plan: Plan, given: nn.ModuleDict | None) -> nn.ModuleDict:
    have = dict(given.items()) if given is not None else dict(program.blocks.items())
    lacking = {name: block for name, block in plan.blocks.items() if name not in have}
    if lacking and program.model is None:
        raise ValueError(f"no modules were given for the blocks {', '.join(lacking)}, and no model to make them for")
    if lacking:
        assert program.model is not None
        have |= dict(build(program.model, lacking).items())
    return nn.ModuleDict({name: have[name] for name in plan.blocks})
