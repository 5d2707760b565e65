"""The rows of a padded batch with several images against each row alone, for families whose inputs can be joined."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from tests.models.zoo import IMAGES, build
from vlmrewrite.testing.models import Row, TinyVLM

MIXED = [Row(0, 2, 2, videos=1), Row(2, 1, 3, videos=1), Row(0, 4, 1)]
NEW = 3


def batches(tiny: TinyVLM) -> list[list[Row]]:
    """The prompts that a family is tried with."""
    return [IMAGES] if tiny.clips is None else [IMAGES, MIXED]


@torch.no_grad()
def check_rows_alone(name: str, *, as_padded: bool = False) -> None:
    """A row in a padded batch gets the logits that it gets alone, without padding or ``as_padded``."""
    tiny = build(name)
    for rows in batches(tiny):
        batch, alone = batch_and_rows(tiny, rows, as_padded)
        logits = tiny.model(**batch).logits[:, -1]
        expected = torch.cat([tiny.model(**one).logits[:, -1] for one in alone])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def check_generation(name: str, *, as_padded: bool = False) -> None:
    """Greedy answers in a padded batch are those of the rows alone, without padding or ``as_padded``."""
    tiny = build(name)
    for rows in batches(tiny):
        batch, alone = batch_and_rows(tiny, rows, as_padded)
        how = {"max_new_tokens": NEW, "do_sample": False}
        found = tiny.model.generate(**batch, **how)[:, -NEW:]
        expected = torch.cat([tiny.model.generate(**one, **how)[:, -NEW:] for one in alone])
        assert torch.equal(found, expected), (found, expected)


def batch_and_rows(
    tiny: TinyVLM, rows: Sequence[Row], as_padded: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One batch, padded on the left, and the same rows one by one."""
    bare = dataclasses.replace(tiny, finish=None)
    alone = [bare.inputs([row], seed=i) for i, row in enumerate(rows)]
    length = max(one["input_ids"].shape[1] for one in alone)
    full = [{key: _filled(x, one["input_ids"].shape, length) for key, x in one.items()} for one in alone]
    batch: dict[str, Any] = {}
    for key in dict.fromkeys(key for one in full for key in one):
        batch[key] = _join([one.get(key) for one in full], key in _of_rows(tiny))
    finish = tiny.finish or (lambda inputs: inputs)
    return finish(batch), [finish(one) for one in (full if as_padded else alone)]


def _filled(x: Tensor, shape: torch.Size, length: int) -> Tensor:
    """What holds a value for each token, with zeros in front of it."""
    return pad(x, (length - x.shape[1], 0)) if x.shape == shape else x


def _of_rows(tiny: TinyVLM) -> set[str]:
    """The inputs whose first axis counts rows, not images, tiles or patches."""
    makers = [maker for maker in (tiny.pictures, tiny.clips) if maker is not None]
    pixels = [maker([2], torch.Generator().manual_seed(0))[1] for maker in makers]
    return {key for inputs in pixels for key, x in inputs.items() if len(x) == 1}


def _join(parts: Sequence[Tensor | None], of_rows: bool) -> Tensor:
    """The tensors one after the other, the smaller ones filled up with zeros, as processors do it."""
    some = [x for x in parts if x is not None]
    size = [max(x.shape[i] for x in some) for i in range(1, some[0].dim())]
    full = []
    for x in parts:
        if x is not None or of_rows:
            whole = some[0].new_zeros(1 if x is None else len(x), *size)
            if x is not None:
                whole[tuple(slice(n) for n in x.shape)] = x
            full.append(whole)
    return torch.cat(full)
