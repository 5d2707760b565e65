"""A program: a captured graph with its anatomy, and, once rewritten, its plan and what each pass said."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

from vlmrewrite.anatomy import Anatomy, Layer, analyse
from vlmrewrite.blocks import build
from vlmrewrite.call import Call
from vlmrewrite.census import Census
from vlmrewrite.complaints import shown
from vlmrewrite.costs import LayerCost, costs
from vlmrewrite.dispatch import Parted, part
from vlmrewrite.formatting import byte_size, describe, span, table
from vlmrewrite.legalize import Rewritten, legalize
from vlmrewrite.plan import FEATURES, Chooser, Pass, Plan
from vlmrewrite.wellformed import check
from vlmrewrite.wellformed import propagate as propagate_fakes


@dataclass(frozen=True)
class Outcome:
    """What became of one pass: ``reason`` says why it was refused, or is None."""

    name: str
    configuration: str
    reason: str | None
    seconds: float = 0.0


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

    def costs(self, census: Census, past: int = 0, held: Sequence[int] = ()) -> list[LayerCost]:
        """Tokens, FLOPs and K/V bytes of each layer in a call; see :func:`vlmrewrite.costs.costs`."""
        return costs(self.anatomy, self.plan, census, past, held)

    def propagate(self) -> None:
        """Check the rewritten graph on fake tensors, if the call is known; see :mod:`vlmrewrite.wellformed`.

        Raises:
            ValueError: a node does not take its inputs, or holds another number of tokens than its set.
        """
        if self.call is not None and self.rewritten is not None:
            arguments = self.arguments(self.inputs, self.call)
            propagate_fakes(self.anatomy, self.rewritten, arguments, self.call.census.size)

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
        return _listing(self)


def _in_range(i: object, n: int, chooser: Chooser) -> int:
    if type(i) is not int or not 0 <= i < n:
        raise ValueError(f"{chooser} chose variant {shown(i)}; expected an int in 0 .. {n - 1}")
    return i


def program_of(gm: torch.fx.GraphModule) -> Program:
    """Analyse a captured graph."""
    start = time.perf_counter()
    anatomy = analyse(gm)
    plan = Plan(len(anatomy.layers), frozenset(FEATURES))
    return Program(gm, anatomy, plan, gm, seconds={"anatomy": time.perf_counter() - start})


def say(plan: Plan, passes: Sequence[Pass], *, strict: bool = False) -> tuple[Plan, list[Outcome]]:
    """Let passes, in order, change a copy of a plan.

    Raises:
        ValueError: a pass is refused and ``strict`` is set, or a pass fails; notes name the pass.
        TypeError: something in ``passes`` is not a pass.
    """
    outcomes: list[Outcome] = []
    for p in passes:
        if not isinstance(p, Pass):
            raise TypeError(f"expected passes such as STS(keep=64), got {p!r}")
        begun = time.perf_counter()
        if plan.variants:
            plan, outcome = _say_to_all(plan, p, strict)
            outcomes.append(outcome)
            continue
        plan = plan.copy()
        same = plan.said.count(p.name)
        plan.label = p.name if not same else f"{p.name}{same + 1}"
        plan.said.append(p.name)
        try:
            reason = p.refuse(plan)
            if reason is None:
                changed = plan.copy()
                p.change(changed)
                changed.check()
                plan = changed
        except Exception as e:
            e.add_note(f"in pass {p!r}, on the plan:\n{plan}")
            raise
        if reason is not None and strict:
            raise ValueError(f"{p!r} was refused: {reason}")
        outcomes.append(Outcome(p.name, repr(p), reason, time.perf_counter() - begun))
    return plan, outcomes


def _say_to_all(plan: Plan, p: Pass, strict: bool) -> tuple[Plan, Outcome]:
    """Let a pass change each plan of a dispatch, or none if one refuses it."""
    said = [say(v, [p], strict=strict) for v in plan.variants]
    plan = plan.copy()
    reasons = [f"variant {i}: {o.reason}" for i, (_, (o,)) in enumerate(said) if o.reason is not None]
    if reasons:
        return plan, replace(said[0][1][0], reason="; ".join(reasons))
    plan.variants = tuple(v for v, _ in said)
    for v in plan.variants:
        plan.blocks |= v.blocks
    return plan, said[0][1][0]


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
    plan, outcomes = say(program.plan, [passes] if isinstance(passes, Pass) else list(passes), strict=strict)
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
    check(program.anatomy, rewritten)
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


def _listing(program: Program) -> str:
    """The compact, layer-level listing of a program: token sets, shapes, and costs if a call is known."""
    a = program.anatomy
    head = f"program: {len(a.layers)} decoder layers, hidden {a.hidden}, {str(a.dtype).removeprefix('torch.')}"
    if program.call is None:
        return f"{head}\n{program.plan}\n" + "\n".join(_shape(layer) for layer in _distinct(a.layers))
    census = program.call.census
    lines = [f"{head}; {describe(census)}"]
    plan = str(program.plan).splitlines()
    lines += [line for line in plan if not line.startswith("layer")]
    per_layer = program.costs(census, program.call.past)
    rows = [["layers", "run on", "attend to", "tokens", "keys", "q", "k, v", "GFLOP", "K/V"]]
    for layers, cost in _grouped(program, per_layer):
        entry, layer = program.plan.layers[layers[0]], a.layers[layers[0]]
        rows.append([span(layers), program.plan.render(entry.run_set), program.plan.render(entry.keys), str(cost.run),
                     str(cost.keys), f"{layer.heads}x{layer.head_size}", f"{layer.kv_heads}x{layer.value_size}",
                     f"{cost.flops / 1e9:.4g}", byte_size(cost.kv_bytes)])  # fmt: skip
    lines += table(rows)
    lines.append(
        f"total: {sum(c.flops for c in per_layer) / 1e9:.4g} GFLOP, K/V {byte_size(sum(c.kv_bytes for c in per_layer))}"
    )
    return "\n".join(lines)


def _grouped(program: Program, per_layer: list[LayerCost]) -> list[tuple[list[int], LayerCost]]:
    def key(c: LayerCost) -> tuple[object, ...]:
        entry = program.plan.layers[c.index]
        return entry.run_set, entry.keys, c.flops, c.kv_bytes

    out = []
    for _, group in groupby(per_layer, key=key):
        found = list(group)
        out.append(([c.index for c in found], found[0]))
    return out


def _distinct(layers: tuple[Layer, ...]) -> list[Layer]:
    return list({(x.heads, x.kv_heads, x.head_size, x.value_size): x for x in layers}.values())


def _shape(layer: Layer) -> str:
    return f"attention: q {layer.heads}x{layer.head_size}, k, v {layer.kv_heads}x{layer.value_size}"
