"""Captured graphs under a recipe, each made once for what it depends on."""

from __future__ import annotations

import contextlib
import threading
import warnings
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from vlmrewrite.capture import Graph
from vlmrewrite.compiler import compile, program_of
from vlmrewrite.hf import Checkpointing, Site
from vlmrewrite.lower import Executable
from vlmrewrite.ops import Backend, Kernels, replaced, resolve
from vlmrewrite.recipe import Recipe

_ELSE = "expected backend='eager' (or 'auto', which runs such a call without the compiler)"
_CHECKPOINTING = (
    f"gradient checkpointing is on, and with backend={{!r}} gradients of some layers came out wrong: {_ELSE}"
)
_ELSEWHERE = f"weights are offloaded or on several devices, and are not there for backend={{!r}}: {_ELSE}"


class Executables(WeakKeyDictionary[Graph, dict[Any, Executable]]):
    """What each captured graph became; it dies with the graph.

    Args:
        recipe, backend, kernels, strict: what :func:`vlmrewrite.apply` was asked for.
    """

    def __init__(self, recipe: Recipe, backend: Backend, kernels: Kernels, strict: bool) -> None:
        super().__init__()
        self._recipe, self._backend, self._kernels, self._strict = recipe, backend, kernels, strict
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def of(
        self,
        graph: Graph,
        missing: dict[str, str],
        device: torch.device,
        blocks: nn.ModuleDict | None,
        again: Checkpointing | None,
        sites: tuple[Site | None, ...],
        last: bool = False,
    ) -> Executable:
        """The graph under the recipe.

        Args:
            missing: facts about the images that the call lacks, with the reasons.
            device: where it runs.
            blocks: modules of the recipe's blocks that are in use.
            again: which layers the backward pass computes again.
            sites: where its inputs are, if weights come and go or are on several devices.
            last: whether each row's last prompt token, in the last column, is all that is read, and without gradients.

        Raises:
            NotImplementedError: layers are to be computed again behind Inductor, or weights are elsewhere there, or in
                blocks; or see :func:`vlmrewrite.compiler.compile`.
        """
        made, form = self.setdefault(graph, {}), again and again.form
        key = frozenset(missing), device, replaced(), blocks, form, sites, last
        with contextlib.nullcontext() if key in made else self._lock:
            if key not in made:
                program, backend = program_of(graph).lacking(missing), resolve(self._backend, device)
                if sites and blocks is not None:
                    raise NotImplementedError(
                        "weights are offloaded or on several devices, and blocks were made of them: restore the model"
                    )
                eager = _CHECKPOINTING if again is not None else _ELSEWHERE if sites else None
                if eager is not None and self._backend in ("inductor", "inductor-whole"):
                    raise NotImplementedError(eager.format(self._backend))
                backend = backend if eager is None else "eager"
                how = self._recipe.passes, self._strict, blocks, self._kernels, backend, device, again, sites, last
                made[key] = new = compile(program, *how)
                told = {f"{o.configuration} does nothing: {o.reason}" for o in new.program.outcomes if o.reason}
                for message in sorted(told - self._warned):
                    warnings.warn(f"recipe {self._recipe.name!r}: {message}", stacklevel=2)
                self._warned |= told
        return made[key]
