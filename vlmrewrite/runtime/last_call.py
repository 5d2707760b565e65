"""What the last call with an image did; in a process with several threads, the last one of the thread that asks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from vlmrewrite.plan import Call, Selection, TokenSet, Vision, intersection
from vlmrewrite.rewrite import Program
from vlmrewrite.runtime.facts import Prompt, prompt_of
from vlmrewrite.runtime.install import session_of


def routing(model: nn.Module) -> Tensor:
    """What the chooser of a dispatch read in the last call with an image, with its gradient history: a router's scores.

    Raises:
        ValueError: no recipe is applied, there was no such call yet, or nothing is read in the graph.
    """
    session = session_of(model)
    value = session.last().result.value
    if value is None:
        raise ValueError(f"recipe {session.recipe.name!r} chooses nothing by a value in the graph")
    return value


def last_call(model: nn.Module) -> tuple[Program, Call, dict[Selection, Tensor]]:
    """What ran in the last call with an image, the call, and what each selection chose in it, bool [F].

    Raises:
        ValueError: no recipe is applied, or there was no such call yet.
    """
    ran = session_of(model).last()
    return ran.program, ran.call, ran.result.chosen


@contextlib.contextmanager
def prompt_ends(model: nn.Module, column: Tensor) -> Iterator[None]:
    """While the block runs, the prompts of calls with images end there, as they do in ``generate()``.

    For training: the answers in ``input_ids`` are none of the prompt, by whose last token tokens and plans are chosen.

    Args:
        model: a rewritten model.
        column: of each row's last prompt token, int64 [B].

    Raises:
        ValueError: no recipe is applied, or these are no columns; a call in the block has not as many rows.
    """
    if column.dim() != 1 or column.is_floating_point() or bool((column < 0).any()):
        raise ValueError(f"prompts end at {column}; expected a column of each row, int64 [B]")
    with prompt_of((session_of(model), "forward"), Prompt(column)):
        yield


@dataclass(frozen=True)
class Stage:
    """Vision tokens that a run of layers works on: ``vision`` bool [B, T], in the logical sequence."""

    name: str
    layers: tuple[int, ...]
    vision: Tensor


def kept_tokens(model: nn.Module) -> list[Stage]:
    """Which vision tokens each layer ran on in the last call with an image.

    Raises:
        ValueError: no recipe is applied, or there was no such call yet.
    """
    program, call, chosen = last_call(model)
    stages: dict[TokenSet, list[int]] = {}
    for entry in program.plan.layers:
        stages.setdefault(entry.run_set, []).append(entry.index)
    return [
        Stage(program.plan.render(s), tuple(layers), call.members(intersection(Vision, s), chosen))
        for s, layers in stages.items()
    ]
