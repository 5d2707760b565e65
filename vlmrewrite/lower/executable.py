"""A rewritten program ready to run: lowered, and compiled if that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch.fx

from vlmrewrite.plan import Call
from vlmrewrite.rewrite import Program, RunResult


@dataclass(frozen=True)
class Executable:
    """One captured graph with a recipe applied.

    Attributes:
        program: what was rewritten.
        backend: what runs it.
        choices: what each kind of dialect operator became, see :class:`vlmrewrite.lower.lowering.Lowered`.
        graphs: the program's graphs, lowered.
        parts: what runs: these graphs, or what a compiler made of them.
    """

    program: Program
    backend: Literal["eager", "inductor"]
    choices: dict[str, list[dict[str, Any]]]
    graphs: tuple[torch.fx.GraphModule, ...]
    parts: tuple[Callable[..., Any], ...]

    def run(self, inputs: Sequence[Any], call: Call) -> RunResult:
        """Run it on the captured graph's flat inputs."""
        return self.program.execute(self.parts, inputs, call)
