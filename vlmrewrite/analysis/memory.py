"""How much memory a graph needs, told by running it on fake tensors: shapes and lifetimes, no numbers."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

_CUDA_BLOCK = 512
"""PyTorch's CUDA allocator hands out multiples of it."""


class Layout(NamedTuple):
    """What a tensor is but for its numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Any) -> Any:
        """The layout of a tensor; anything else as it is."""
        return cls(tuple(x.shape), x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x

    def empty(self) -> Tensor:
        """A tensor like it."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operators make while it is on: those alive ``now``, and their ``peak``.

    Tensors that operators are given and that it did not see being made count nothing, nor do views of them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor):
                self._meet(x, given=True)
        out = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(out):
            if isinstance(x, Tensor):
                self._meet(x, given=False)
        self.peak = max(self.peak, self.now)
        return out

    def give(self, tensors: Sequence[Tensor]) -> None:
        """Tensors that are there already; they must outlive the count."""
        for x in tensors:
            self._meet(x, given=True)

    def _meet(self, x: Tensor, given: bool) -> None:
        storage = x.untyped_storage()
        known = self._known.get(key := id(storage))
        if known is not None and known() is storage:
            return
        size = 0 if given else storage.nbytes()
        if x.device.type == "cuda":
            size = -(-size // _CUDA_BLOCK) * _CUDA_BLOCK
        self.now += size

        def gone(ref: Any) -> None:
            self.now -= size
            if self._known.get(key) is ref:
                del self._known[key]

        self._known[key] = weakref.ref(storage, gone)


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
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weights = [mode.from_tensor(x) for gm in (head, *(t.graph for t in tails)) for x in _tensors(gm)]
        given, *more = ([fake(x, mode) for x in a] for a in (arguments, *(t.arguments for t in tails)))
        live = LiveBytes()
        live.give(weights)
        with live:
            results = head(*given)
            for tail, args in zip(tails, more, strict=True):
                tail.graph(*args, *(results[k] for k in tail.takes))
        del results
    return live.peak


def _tensors(gm: torch.fx.GraphModule) -> list[Tensor]:
    return [*gm.parameters(), *gm.buffers()]


def fake(x: Any, mode: FakeTensorMode) -> Any:
    """A fake tensor for a tensor or, if the mode is on, a layout; anything else as it is."""
    if isinstance(x, Layout):
        return x.empty()
    return mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x
