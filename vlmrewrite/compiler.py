"""The compiler, from a captured graph to something that runs, in the order in which it happens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from vlmrewrite.lower import Executable
from vlmrewrite.ops import Kernels
from vlmrewrite.plan import Pass
from vlmrewrite.rewrite import Program, rewrite


def compile(
    program: Program,
    passes: Sequence[Pass],
    *,
    strict: bool,
    blocks: nn.ModuleDict,
    kernels: Kernels,
    backend: Literal["eager", "inductor"],
    device: torch.device,
) -> Executable:
    """Compile a captured graph.

    Args:
        program: of the captured graph.
        passes: what to do, in order.
        strict: raise when a pass is refused.
        blocks: modules of the blocks that the passes ask for, by name.
        kernels, backend, device: what runs it, and where.

    Raises:
        ValueError: a pass is refused and ``strict`` is set, or a pass or the rewrite fails; notes name the pass.
        RuntimeError: kernels asked for by name cannot run there.
    """
    rewritten = rewrite(program, passes, strict=strict, blocks=blocks)
    return Executable.of(rewritten, kernels, backend, device)
