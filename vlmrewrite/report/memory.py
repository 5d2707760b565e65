"""How much memory a graph needs, told by running it on fake tensors: shapes and lifetimes, no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor

from vlmrewrite.compat import dispatch_mode, fake_mode, tree_leaves
from vlmrewrite.lower import lower
from vlmrewrite.runtime import Layout, Session

_CUDA_BLOCK = 512
"""PyTorch's CUDA allocator hands out multiples of it."""


class LiveBytes(dispatch_mode()):  # type: ignore[misc]
    """Counts the bytes of tensors that operators make while it is on: those alive ``now``, and their ``peak``.

    Tensors that operators are given and that it did not see being made count nothing, nor do views of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._sizes: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()

    @property
    def now(self) -> int:
        """The bytes of those that are alive."""
        return sum(self._sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.give(tree_leaves((args, kwargs)))
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._sizes.setdefault(x.untyped_storage(), _allocated(x))
        self.peak = max(self.peak, self.now)
        return out

    def give(self, there: Iterable[object]) -> None:
        """Tensors that are there already; anything else is left out."""
        for x in there:
            if isinstance(x, Tensor):
                self._sizes.setdefault(x.untyped_storage(), 0)


def _allocated(x: Tensor) -> int:
    """The bytes that a tensor's memory takes on its device, even if it is a fake one."""
    block = _CUDA_BLOCK if x.device.type == "cuda" else 1
    return -(-x.untyped_storage().nbytes() // block) * block


class Tail(NamedTuple):
    """A graph that runs after another, the head.

    Attributes:
        graph: what runs.
        arguments: its first ones.
        takes: which of the head's results follow.
    """

    graph: torch.fx.GraphModule
    arguments: Sequence[Any]
    takes: Sequence[int]


@torch.no_grad()
def peak_bytes(head: torch.fx.GraphModule, arguments: Sequence[Any], tails: Sequence[Tail] = ()) -> int:
    """The largest number of bytes that a graph holds at a time, beyond its arguments and weights, without gradients.

    What an operator that tracing does not see through uses inside is not known and not counted, nor is the workspace of
    a library. A compiler that fuses operators needs less.

    Args:
        head: what runs.
        arguments: its, where a :class:`Layout` may stand for a tensor.
        tails: what runs after it, one after another; the head's results are kept, those of all tails but the last not.
    """
    with fake_mode() as mode:
        graphs = (head, *(t.graph for t in tails))
        weights = [mode.from_tensor(x) for gm in graphs for x in (*gm.parameters(), *gm.buffers())]
        given, *more = ([_fake(x, mode) for x in a] for a in (arguments, *(t.arguments for t in tails)))
        live = LiveBytes()
        live.give(weights)
        with live:
            results = head(*given)
            for tail, args in zip(tails, more, strict=True):
                tail.graph(*args, *(results[k] for k in tail.takes))
    return live.peak


def _fake(x: Any, mode: Any) -> Any:
    if isinstance(x, Layout):
        return torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device=x.device)
    return mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x


def peak_memory(session: Session) -> dict[str, int]:
    """Peak bytes of the decoder's graph in the last call with an image, before and after.

    Raises:
        ValueError: there was none yet.
    """
    latest = session.last()
    device = latest.call.vision.device
    before = lower(latest.executable.program.captured, session.kernels, device).graph_module
    program, (first, *more) = latest.executable.program, latest.executable.graphs
    arguments, tails = program.arguments(latest.inputs, latest.call), list[Tail]()
    if (parted := program.dispatch) is not None:
        given = (program.arguments(latest.inputs, latest.call, i) for i in latest.result.ran)
        tails = [Tail(more[i], g, parted.takes[i]) for i, g in zip(latest.result.ran, given, strict=True)]
    with torch.autocast(device.type, latest.autocast, enabled=latest.autocast is not None):
        return {"before": peak_bytes(before, latest.inputs), "after": peak_bytes(first, arguments, tails)}
