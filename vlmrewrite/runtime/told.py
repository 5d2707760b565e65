"""What a caller tells the forwards that it makes itself: where prompts end, and which plan to follow."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmrewrite.hf import on_base_model
from vlmrewrite.runtime.facts import Prompt, current_prompt, prompt_of
from vlmrewrite.runtime.session import session_of


@on_base_model
def prompt_ends(model: nn.Module, column: Tensor) -> AbstractContextManager[None]:
    """While the block runs, the prompts of calls with images end there, as they do in ``generate()``.

    For training: the answers in ``input_ids`` are none of the prompt, by whose last token tokens and plans are chosen.
    It holds for this context (see :mod:`contextvars`), and so not for calls that the block makes in another thread. A
    thread whose target is ``contextvars.copy_context().run``, and ``asyncio.to_thread``, take the context along.

    Args:
        model: a rewritten model.
        column: of each row's last prompt token, int64 [B], counted from the start of the sequence: on a cache, what it
            holds is part of it.

    Raises:
        ValueError: no recipe is applied, or these are no columns; a call in the block has not as many rows.
    """
    if column.dim() != 1 or column.is_floating_point() or bool((column < 0).any()):
        raise ValueError(f"prompts end at {column}; expected a column of each row, int64 [B]")
    return _told(model, end=column)


@on_base_model
def following(model: nn.Module, variant: int) -> AbstractContextManager[None]:
    """While the block runs, all rows of calls with images follow one plan of a dispatch, whatever its chooser says.

    For training and for measuring what each plan is worth. As :func:`prompt_ends`, it holds for this context.

    Args:
        model: a rewritten model.
        variant: the plan's number, from 0, the cheapest.

    Raises:
        ValueError: no recipe is applied, it has no dispatch, or no such plan.
    """
    session = session_of(model)
    n = len(session.plan.variants)
    if not n:
        raise ValueError(f"recipe {session.recipe.name!r} has one plan: there is none to choose")
    if type(variant) is not int or not 0 <= variant < n:
        raise ValueError(f"variant={variant!r}; expected an int in 0 .. {n - 1}")
    return _told(model, follows=variant)


def _told(model: nn.Module, **facts: Any) -> AbstractContextManager[None]:
    """What forwards that no generation calls are to know, beside what they know already."""
    owner = session_of(model), "forward"
    return prompt_of(owner, replace(current_prompt(owner) or Prompt(), **facts))


def before_labels(labels: Tensor) -> Tensor:
    """Where the prompts of labelled rows end, for :func:`prompt_ends`: the column before each row's first label.

    Args:
        labels: int64 [B, T], -100 for none; a row without any is all prompt.

    Returns:
        int64 [B].
    """
    has = labels != -100
    first = has.long().argmax(1) - 1
    return torch.where(has.any(1), first.clamp(min=0), labels.shape[1] - 1)
