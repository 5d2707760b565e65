"""A rewritten program made ready to run: lowered, and compiled if that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlmrewrite.analysis import Tail, peak_bytes
from vlmrewrite.lower.lowering import compiled, lower, told
from vlmrewrite.ops import Kernels
from vlmrewrite.plan import Call
from vlmrewrite.rewrite import Program


@dataclass(frozen=True)
class RunResult:
    """What came out of a run.

    Attributes:
        program: whose plan was followed; of a dispatch, the variant that was chosen.
        out: the captured outputs.
        chosen: which vision tokens each of its selections chose, bool [F].
        value: what the chooser of a dispatch read in the graph, or None.
        given_up: of a dispatch, the variants that ran before and whose results were not kept.
    """

    program: Program
    out: Any
    chosen: tuple[Tensor, ...]
    value: Tensor | None = None
    given_up: tuple[Program, ...] = ()


@dataclass(frozen=True)
class Executable:
    """One captured graph with a recipe applied.

    Attributes:
        program: what was rewritten.
        backend: what runs it.
        choices: what each kind of dialect operator became, see :class:`vlmrewrite.lower.lowering.Lowered`.
        graphs: the whole graph lowered, or of a dispatch the head and the tails.
        parts: what runs: these graphs, or what a compiler made of them.
    """

    program: Program
    backend: Literal["eager", "inductor"]
    choices: dict[str, list[dict[str, Any]]]
    graphs: tuple[torch.fx.GraphModule, ...]
    parts: tuple[Callable[..., Any], ...]

    @classmethod
    def of(
        cls, program: Program, kernels: Kernels, backend: Literal["eager", "inductor"], device: torch.device
    ) -> Executable:
        """Lower a rewritten program, for a device."""
        parted = program.parted
        graphs = (program.graph_module,) if parted is None else (parted.head, *parted.tails)
        lowered = [lower(gm, kernels, device) for gm in graphs]
        made = tuple(low.graph_module for low in lowered)
        parts = made if backend == "eager" else tuple(map(compiled, made))
        return cls(program, backend, told(sum((low.counts for low in lowered), Counter())), made, parts)

    def run(self, inputs: Sequence[Any], call: Call) -> RunResult:
        """Run it on the captured graph's flat inputs."""
        head, *tails = self.parts
        if self.program.variants:
            (*given_up, kept), (out, chosen), value = self.program.dispatched(inputs, call, head, tails)
            return RunResult(kept, out, chosen, value, tuple(given_up))
        out, chosen = head(*self.program.arguments(inputs, call))
        return RunResult(self.program, out, chosen)

    def peak_bytes(self, ran: RunResult, inputs: Sequence[Any], call: Call) -> int:
        """Memory that a run takes beyond its inputs; see :func:`vlmrewrite.analysis.memory.peak_bytes`.

        Args:
            ran: that run.
            inputs: the captured graph's flat inputs in it, or their layouts.
            call: what it was a run for.
        """
        if self.program.parted is None:
            return peak_bytes(self.graphs[0], self.program.arguments(inputs, call))
        parted, (head, *tails) = self.program.parted, self.graphs
        first = [*inputs, *(call.fill(extra) for extra in parted.extras)]
        order = [(variant, self.program.variants.index(variant)) for variant in (*ran.given_up, ran.program)]
        ran_tails = [Tail(tails[i], variant.arguments(inputs, call), parted.takes[i]) for variant, i in order]
        return peak_bytes(head, first, ran_tails)
