"""What belongs to one call and to nobody else: its prompt, what it was given, and what came of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmrewrite.hf import Encoded
from vlmrewrite.lower import Executable
from vlmrewrite.plan import Call
from vlmrewrite.rewrite import Program, RunResult

ARGUMENT = "vlmrewrite_prompt"
"""The keyword under which a generation hands its :class:`Prompt` to its own forwards."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a generation knows and its forwards cannot see.

    Attributes:
        end: column of each row's last prompt token, int64 [B], or None. (Without a cache the sequence grows past it.)
        thw: the images' grids, int [I, 3], or None.
    """

    end: Tensor | None = None
    thw: Tensor | None = None

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Prompt:
        """That of a call of ``generate``."""
        thw = kwargs.get("image_grid_thw")
        tokens = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs", kwargs.get("inputs_embeds")))
        if not isinstance(tokens, Tensor) or tokens.dim() < 2:
            return cls(None, thw)
        mask = kwargs.get("attention_mask")
        columns = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[0], -1)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == columns.shape:
            columns = columns * mask.to(columns)
        return cls(columns.amax(1), thw)


_PROMPTS: ContextVar[tuple[tuple[object, Prompt], ...]] = ContextVar("vlmrewrite_prompts", default=())


@contextmanager
def prompt_of(owner: object, prompt: Prompt) -> Iterator[None]:
    """While the block runs, in this context, ``owner``'s innermost prompt is this one.

    Owners are sessions: a session alone stands for its generations, which hand the prompt on themselves; with
    ``"forward"``, for forwards that no generation called.
    """
    token = _PROMPTS.set((*_PROMPTS.get(), (owner, prompt)))
    try:
        yield
    finally:
        _PROMPTS.reset(token)


def current_prompt(owner: object) -> Prompt | None:
    """The innermost prompt of ``owner``, in this context."""
    return next((prompt for who, prompt in reversed(_PROMPTS.get()) if who == owner), None)


@dataclass(frozen=True)
class Given:
    """What a call with an image was given, as far as the captured graph's inputs do not say.

    Attributes:
        images: the encoded images.
        mask: the attention mask, or None without padding.
        past: logical length of the cache before the call.
        held: keys that each layer held before the call.
        thw: the model's image-grid input, int [I, 3], or None.
        end: column of each row's last prompt token, int64 [B], or None: the last real token.
    """

    images: Encoded
    mask: Any
    past: int
    held: tuple[int, ...]
    thw: Tensor | None
    end: Tensor | None


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


@dataclass(frozen=True)
class LastCall:
    """A call with an image that has run: what ran, what came out of it, the call, and what it was given.

    ``inputs`` are the captured graph's flat inputs, a :class:`Layout` for each tensor;
    ``autocast`` the dtype that operators were cast to, or None.
    """

    executable: Executable
    result: RunResult
    call: Call
    given: Given
    inputs: tuple[Any, ...]
    autocast: torch.dtype | None

    @property
    def program(self) -> Program:
        """What ran; of a dispatch, the program of the plan that was chosen."""
        whole, ran = self.executable.program, self.result.ran
        if whole.dispatch is None:
            return whole
        return replace(whole, plan=self.result.plan, rewritten=whole.dispatch.rewritten[ran[-1]], dispatch=None)


class Latest:
    """The last call with an image: of the thread that asks, or if it made none, of any."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._any: LastCall | None = None

    def set(self, call: LastCall) -> None:
        """The thread's last call is this one."""
        self._mine.call = self._any = call

    def get(self) -> LastCall | None:
        """The last call, or None."""
        mine: LastCall | None = getattr(self._mine, "call", None)
        return self._any if mine is None else mine


class Tally:
    """A count that threads add to without waiting for one another."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self) -> None:
        """One more."""
        me = threading.get_ident()
        self._counts[me] = self._counts.get(me, 0) + 1

    def total(self) -> int:
        """Of all threads."""
        return sum(list(self._counts.values()))
