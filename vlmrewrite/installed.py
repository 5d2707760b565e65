"""A rewritten program made ready to run: lowered, and compiled if that was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from vlmrewrite.call import Call
from vlmrewrite.choice import Kernels
from vlmrewrite.lower import compiled, lower, told
from vlmrewrite.program import Program


@dataclass(frozen=True)
class Ran:
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
class Installed:
    """One captured graph with a recipe applied.

    Attributes:
        program: what was rewritten.
        backend: what runs it.
        choices: what each kind of dialect operator became, see :class:`vlmrewrite.lower.Lowered`.
        parts: what runs: the whole graph, or of a dispatch the head and the tails.
    """

    program: Program
    backend: Literal["eager", "inductor"]
    choices: dict[str, list[dict[str, Any]]]
    parts: tuple[Callable[..., Any], ...]

    @classmethod
    def of(
        cls, program: Program, kernels: Kernels, backend: Literal["eager", "inductor"], device: torch.device
    ) -> Installed:
        """Lower a rewritten program, for a device."""
        graphs = [program.graph_module]
        if program.parted is not None:
            graphs = [program.parted.head, *program.parted.tails]
        lowered = [lower(gm, kernels, device) for gm in graphs]
        parts = [low.graph_module if backend == "eager" else compiled(low.graph_module) for low in lowered]
        return cls(program, backend, told(sum((low.counts for low in lowered), Counter())), tuple(parts))

    def run(self, inputs: Sequence[Any], call: Call) -> Ran:
        """Run it on the captured graph's flat inputs."""
        if self.program.variants:
            (*given_up, kept), (out, chosen), value = self.program.dispatched(
                inputs, call, self.parts[0], self.parts[1:]
            )
            return Ran(kept, out, chosen, value, tuple(given_up))
        out, chosen = self.parts[0](*self.program.arguments(inputs, call))
        return Ran(self.program, out, chosen)
