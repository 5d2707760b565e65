"""How much memory a graph needs, told by running it on fake tensors: shapes and lifetimes, no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
from torch import Tensor

from vlmrewrite.compat import at_most, dispatch_mode, fake_mode, tree_leaves
from vlmrewrite.lower import lower
from vlmrewrite.ops import SCRATCH, Along, cut
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
        if func in SCRATCH:
            self.peak = max(self.peak, self.now + SCRATCH[func](*args, **(kwargs or {})))
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
    return -(-at_most(x.untyped_storage().nbytes()) // block) * block


class Tail(NamedTuple):
    """A graph that runs after another, the head.

    Attributes:
        graph: what runs.
        arguments: its first ones.
        takes: which of the head's results follow.
        cuts: where the first of its arguments, and what it takes, hold rows, if it runs for some rows.
        at: these rows, int64 [b], and their vision tokens, int64 [f].
        kept: whether what it returns is held until the end.
    """

    graph: torch.fx.GraphModule
    arguments: Sequence[Any]
    takes: Sequence[int]
    cuts: Sequence[Along] | str = ()
    at: tuple[Tensor, ...] = ()
    kept: bool = False

    def run(self, arguments: list[Any], results: Sequence[Any], at: list[Any]) -> Any:
        """Run it, on fake arguments and rows, and what the head made."""
        taken, n = [results[k] for k in self.takes], len(self.cuts) - len(self.takes)
        if at and not isinstance(self.cuts, str):
            arguments[:n] = (cut(x, along, *at) for x, along in zip(arguments[:n], self.cuts[:n], strict=True))
            taken = [cut(x, along, *at) for x, along in zip(taken, self.cuts[n:], strict=True)]
        return self.graph(*arguments, *taken)


@torch.no_grad()
def peak_bytes(
    head: torch.fx.GraphModule,
    arguments: Sequence[Any],
    tails: Sequence[Tail] = (),
    join: Callable[[Sequence[Any], Sequence[Any]], Any] = lambda held, results: None,
) -> int:
    """The largest number of bytes that a graph holds at a time, beyond its arguments and weights, without gradients.

    What an operator that tracing does not see through uses inside is counted if it was defined with ``scratch``; what a
    library uses is not. What is as long as a mask has tokens counts as long as the mask. A compiler that fuses
    operators needs less.

    Args:
        head: what runs.
        arguments: its, where a :class:`Layout` may stand for a tensor.
        tails: what runs after it, one after another; the head's results are kept.
        join: what is made at the end of what was kept of tails, and of the head's results.
    """
    with fake_mode() as mode:
        graphs = (head, *(t.graph for t in tails))
        weights = [mode.from_tensor(x, static_shapes=True) for gm in graphs for x in (*gm.parameters(), *gm.buffers())]
        given, *more = ([_fake(x, mode) for x in a] for a in (arguments, *(t.arguments for t in tails)))
        live = LiveBytes()
        live.give(weights)
        with live:
            results, held = head(*given), []
            for tail, args in zip(tails, more, strict=True):
                out = tail.run(args, results, [_fake(x, mode) for x in tail.at])
                held += [out] * tail.kept
                del out
            _ = join(held, results)
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
    call, parted, runs = latest.call, program.dispatch, latest.result.runs
    tails, kept = list[Tail](), [run for run in runs if run.kept]
    for run in runs:
        assert parted is not None
        cuts, some, at = parted.cuts[run.variant], call, torch.tensor(run.rows, device=device)
        where: tuple[Tensor, ...] = ()
        if len(run.rows) < len(call.vision):
            where, some = (at, call.tokens_of(at).nonzero()[:, 0]), call.of_rows(at)
        arguments = program.arguments(latest.inputs, some, run.variant)
        tail = Tail(more[run.variant], arguments, parted.takes[run.variant], cuts, where, bool(run.kept))
        tails.append(tail)

    def join(held: Sequence[Any], results: Sequence[Any]) -> Any:
        return parted and parted.joined([(run, out[0]) for run, out in zip(kept, held, strict=True)], results)

    arguments = program.arguments(latest.inputs, call)
    with torch.autocast(device.type, latest.autocast, enabled=latest.autocast is not None):
        return {"before": peak_bytes(before, latest.inputs), "after": peak_bytes(first, arguments, tails, join)}
