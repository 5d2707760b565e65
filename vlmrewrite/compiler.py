"""The compiler, in the order in which it happens: capture, anatomy, plan, legalize, verify, lower.

A model's forward is captured in :mod:`vlmrewrite.capture`, when it is called; everything behind that is here.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from vlmrewrite.analysis import analyse
from vlmrewrite.capture import Graph
from vlmrewrite.hf import Checkpointing, Site
from vlmrewrite.lower import Executable, behind, by_kind, lower, placed, recomputed
from vlmrewrite.ops import Kernels, Running
from vlmrewrite.plan import FEATURES, Pass, Plan, build, for_last, run_passes
from vlmrewrite.progress import waiting
from vlmrewrite.rewrite import Program, check_sets, dispatch, legalize

_LOG = logging.getLogger(__name__)


def program_of(graph: Graph) -> Program:
    """The program of a captured graph that was run with images, without passes; analysed once.

    Raises:
        ValueError: a part of the graph could not be recognised; the message names it.
    """

    def make() -> Program:
        assert graph.features is not None, "it has not been run with images"
        start = time.perf_counter()
        anatomy = analyse(graph.gm, graph.features)
        seconds = {"anatomy": time.perf_counter() - start}
        owners = tuple(layer.owner for layer in anatomy.layers)
        kinds = {layer.index: layer.kind for layer in anatomy.layers if layer.kind != "attention"}
        plan = Plan(len(anatomy.layers), frozenset(FEATURES), owners=owners, kinds=kinds)
        return Program(graph.gm, anatomy, plan, seconds=seconds, parameters=graph.parameters)

    return graph.once("program", make)


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
        strict: raise when a pass is refused, or its ``change`` says nothing to the plan.
        blocks: modules of the blocks that the passes ask for, by name; without them they are made new.
        propagate: if the program holds the call that it was captured from, run the new graph on fake tensors and check
            that every node holds as many tokens as its set.

    Warns:
        UserWarning: a pass is refused, which is left out, with the reason.

    Raises:
        ValueError: a pass is refused and ``strict`` is set, or a pass or the rewrite fails; notes name the pass.
        TypeError: something in ``passes`` is not a pass.
    """
    made = rewritten(program, passes, strict=strict, blocks=blocks, propagate=propagate)
    for outcome in made.outcomes[len(program.outcomes) :]:
        if outcome.reason is not None:
            warnings.warn(f"rewrite: {outcome.configuration} does nothing: {outcome.reason}", stacklevel=2)
    return made


def rewritten(
    program: Program,
    passes: Sequence[Pass] | Pass,
    *,
    strict: bool = False,
    blocks: nn.ModuleDict | None = None,
    propagate: bool = True,
    last: bool = False,
) -> Program:
    """:func:`rewrite`, for who tells the user by other means what was refused: without its warnings.

    With ``last``, for calls of which each row's last prompt token, in the last column, is all that is read.
    """
    times = [time.perf_counter()]
    plan, outcomes = run_passes(program.plan, [passes] if isinstance(passes, Pass) else list(passes), strict=strict)
    times.append(time.perf_counter())
    try:
        modules = _modules(program, plan, blocks)
        done = for_last(plan, program.of_last[0]) if last else plan
        variants = [
            legalize(program.captured, program.anatomy, variant, modules, program.parameters)
            for variant in done.variants or (done,)
        ]
        cut = dispatch(variants, program.captured.graph, program.anatomy) if plan.variants else None
        times.append(time.perf_counter())
        for variant in variants:
            check_sets(program.anatomy, variant)
        made = replace(
            program,
            plan=plan,
            variants=tuple(variants),
            dispatch=cut,
            outcomes=(*program.outcomes, *outcomes),
            blocks=modules,
        )
        if propagate:
            made.propagate()
    except Exception as e:
        e.add_note(f"under {', '.join(o.configuration for o in outcomes)}, while rewriting to the plan:\n{plan}")
        raise
    times.append(time.perf_counter())
    steps = zip(("passes", "legalize", "verify"), pairwise(times), strict=True)
    return replace(made, seconds=program.seconds | {name: after - before for name, (before, after) in steps})


def compile(
    program: Program,
    passes: Sequence[Pass],
    strict: bool,
    blocks: nn.ModuleDict | None,
    kernels: Kernels,
    backend: Running,
    device: torch.device,
    again: Checkpointing | None = None,
    sites: Sequence[Site | None] = (),
    last: bool = False,
) -> Executable:
    """Make a captured program ready to run under some passes.

    Args:
        program: of the captured graph.
        passes: what to do, in order.
        strict: raise when a pass is refused, or its ``change`` says nothing to the plan.
        blocks: modules of the blocks that the passes ask for, by name.
        kernels, backend, device: what runs it, and where.
        again: which layers the backward pass computes again.
        sites: where the captured graph's inputs are, if that may not be one place for all.
        last: whether each row's last prompt token, in the last column, is all that is read.

    Raises:
        ValueError: a pass is refused and ``strict`` is set, or a pass or the rewrite fails; notes name the pass.
        NotImplementedError: the weights are on several devices, and the passes choose among plans.
        RuntimeError: kernels asked for by name cannot run there.
    """
    begun = time.perf_counter()
    with waiting("rewriting the graph"):
        made = rewritten(program, passes, strict=strict, blocks=blocks, last=last)
        lowered = [lower(gm, kernels, device) for gm in made.graphs]
        graphs = tuple(low.graph_module for low in lowered)
    running = graphs
    if any(site is not None and site.device != device for site in sites):
        _check_apart(made, sites)
        running = tuple(placed(gm, sites, device, made.captured.graph) for gm in graphs)
    saving = running if again is None else tuple(recomputed(gm, again.run, again.which) for gm in running)
    parts = tuple(behind(gm, backend) for gm in saving)
    said = ", ".join(o.configuration + f" (refused: {o.reason})" * (o.reason is not None) for o in made.outcomes)
    what = "%d graph(s) for %s under %s in %.2f s: %d decoder layers, %d selections"
    selections = len({s for plan in made.plan.variants or (made.plan,) for s in plan.selections()})
    seconds = time.perf_counter() - begun
    _LOG.info(what, len(graphs), device, said or "no pass", seconds, made.plan.depth, selections)
    return Executable(made, backend, by_kind(sum((low.counts for low in lowered), Counter())), graphs, parts)


def _check_apart(program: Program, sites: Sequence[Site | None]) -> None:
    """Raise where a program cannot run with its weights on several devices."""
    if program.dispatch is not None:
        raise NotImplementedError(
            "the model is on several devices, and the recipe chooses among plans in each call: expected a recipe of one"
            " plan, or a model on one device"
        )
    found: dict[int, set[str]] = {}
    for node, site in zip(program.captured.graph.find_nodes(op="placeholder"), sites, strict=True):
        if site is not None and node.name in program.parameters:
            found.setdefault(program.parameters[node.name][0], set()).add(str(site.device))
    for layer, owner in enumerate(program.plan.owners):
        if layer != owner and len(found[layer] | found[owner]) > 1:
            here, there = (" and ".join(sorted(found[i])) for i in (layer, owner))
            raise NotImplementedError(
                f"layer {layer} is on {here}, and layer {owner}, to whose keys it attends, on {there}: expected both on"
                " one device"
            )


def _modules(program: Program, plan: Plan, given: nn.ModuleDict | None) -> nn.ModuleDict:
    """The modules of a plan's blocks: those that are there, and new ones."""
    have = dict((program.blocks if given is None else given).items())
    lacking = {name: block for name, block in plan.blocks.items() if name not in have}
    if lacking and program.model is None:
        raise ValueError(f"no modules were given for the blocks {', '.join(lacking)}, and no model to make them for")
    if lacking:
        assert program.model is not None
        have |= dict(build(program.model, lacking).items())
    return nn.ModuleDict({name: have[name] for name in plan.blocks})
