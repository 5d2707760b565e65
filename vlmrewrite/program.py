"""A program: a captured graph with its anatomy, and, once rewritten, its plan and what each pass said."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
import torch.fx
from torch import Tensor

from vlmrewrite.anatomy import Anatomy, Layer, analyse
from vlmrewrite.call import Call
from vlmrewrite.census import Census
from vlmrewrite.formatting import byte_size, describe, span, table
from vlmrewrite.legalize import Rewritten, legalize
from vlmrewrite.plan import Pass, Plan
from vlmrewrite.tokens import TokenSet
from vlmrewrite.wellformed import check


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
    missing: dict[str, str] = field(default_factory=dict)

    def vision_mask(self) -> torch.fx.GraphModule:
        """The part of the graph that computes the vision-token mask, bool [B, T], from the same inputs."""
        graph = torch.fx.Graph()
        env: dict[torch.fx.Node, torch.fx.Node] = {}
        graph.graph_copy(self.captured.graph, env)
        graph.output(env[self.anatomy.vision])
        graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
        return torch.fx.GraphModule(self.captured, graph)

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
        out = self.graph_module(*self.arguments(inputs, call))
        return out if self.rewritten is not None else (out, ())

    def __str__(self) -> str:
        return _listing(self)


def program_of(gm: torch.fx.GraphModule, missing: dict[str, str] | None = None) -> Program:
    """Analyse a captured graph. ``missing``: features that cannot be reached, with the reason."""
    start = time.perf_counter()
    anatomy = analyse(gm)
    missing = missing if missing is not None else {"encoder_features": "they are not captured"}
    features = frozenset({"features", "encoder_features"} - set(missing))
    plan = Plan(len(anatomy.layers), features, dict(missing))
    return Program(gm, anatomy, plan, gm, seconds={"anatomy": time.perf_counter() - start}, missing=dict(missing))


def rewrite(program: Program, passes: Sequence[Pass] | Pass, *, strict: bool = False) -> Program:
    """Apply passes, in order, to a program; the old program is untouched.

    Raises:
        ValueError: a pass is refused and ``strict`` is set, or a pass or the rewrite fails; notes name the pass.
        TypeError: something in ``passes`` is not a pass.
    """
    passes = [passes] if isinstance(passes, Pass) else list(passes)
    plan, outcomes = program.plan.copy(), list(program.outcomes)
    start = time.perf_counter()
    for p in passes:
        if not isinstance(p, Pass):
            raise TypeError(f"expected passes such as STS(keep=64), got {p!r}")
        begun = time.perf_counter()
        try:
            reason = p.refuse(plan)
            if reason is None:
                changed = plan.copy()
                p.change(changed)
                plan = changed
        except Exception as e:
            e.add_note(f"in pass {p!r}, on the plan:\n{plan}")
            raise
        if reason is not None and strict:
            raise ValueError(f"{p!r} was refused: {reason}")
        outcomes.append(Outcome(p.name, repr(p), reason, time.perf_counter() - begun))
    planned = time.perf_counter()
    try:
        rewritten = legalize(program.captured, program.anatomy, plan)
        check(program.anatomy, rewritten)
    except Exception as e:
        e.add_note(f"while rewriting to the plan:\n{plan}")
        raise
    seconds = {**program.seconds, "passes": planned - start, "legalize": time.perf_counter() - planned}
    return replace(
        program,
        graph_module=rewritten.graph_module,
        plan=plan,
        rewritten=rewritten,
        outcomes=tuple(outcomes),
        seconds=seconds,
    )


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs in one call, all rows together.

    ``run`` and ``keys`` are the lengths, a row, of what it computes on and of what it adds to the cache.
    """

    index: int
    run: int
    keys: int
    flops: int
    kv_bytes: int


def costs(program: Program, census: Census, past: int = 0) -> list[LayerCost]:
    """Tokens, matmul FLOPs and K/V bytes of each layer under the program's plan."""
    batch = len(census.text)
    out = []
    sizes: dict[TokenSet, int] = {}
    for layer, entry in zip(program.anatomy.layers, program.plan.layers, strict=True):
        run, keys = (sizes.setdefault(s, census.size(s)) for s in (entry.run_set, entry.keys))
        out.append(
            LayerCost(layer.index, run, keys, layer.flops(batch, run, keys, past), batch * keys * layer.kv_bytes)
        )
    return out


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
    per_layer = costs(program, census, program.call.past)
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
