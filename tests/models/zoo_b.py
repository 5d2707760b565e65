"""What every tiny model of the zoo must do, as checks that take its name; the tests call them for their families."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmrewrite.testing.models import ZOO, Row, TinyVLM

IMAGES = [Row(1, 3, 2), Row(2, 1, 3), Row(0, 4, 1)]
VIDEOS = [Row(0, 2, 2, videos=1), Row(2, 1, 3, videos=1), Row(0, 4, 1)]
NEW = 3


@functools.cache
def build(name: str) -> TinyVLM:
    return ZOO[name](layers=4)


def batches(tiny: TinyVLM) -> list[list[Row]]:
    """The prompts that a family is tried with."""
    return [IMAGES] if tiny.clips is None else [IMAGES, VIDEOS]


def check_same_seed_same_model(name: str) -> None:
    before = torch.random.get_rng_state()
    tiny, again, other = build(name), ZOO[name](layers=4), ZOO[name](layers=4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    pairs = zip(tiny.model.parameters(), again.model.parameters(), other.model.parameters(), strict=True)
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)
    for rows in batches(tiny):
        a, b, c = tiny.inputs(rows, seed=3), again.inputs(rows, seed=3), tiny.inputs(rows, seed=4)
        assert all(torch.equal(a[key], b[key]) for key in a)
        assert not torch.equal(a["pixel_values"].flatten()[:9], c["pixel_values"].flatten()[:9])
    assert tiny.name == name
    assert tiny.model.config.get_text_config().num_hidden_layers == 4


@torch.no_grad()
def check_sane_and_looks(name: str) -> None:
    """It runs on a padded batch, is sane, and looks at its images and videos."""
    tiny = build(name)
    for rows in batches(tiny):
        for side in ("right", "left"):
            inputs = tiny.inputs(rows, side=side)
            real, logits = inputs["attention_mask"].bool(), tiny.model(**inputs).logits
            assert logits.shape[:2] == real.shape
            assert logits[real].isfinite().all()
            spread = float(logits[real].std())
            assert 0.3 < spread < 10, spread
        others = {key: -x if key.startswith("pixel_values") else x for key, x in inputs.items()}
        change = (tiny.model(**others).logits - logits)[:, -1].abs().amax(-1)
        for row, by in zip(rows, change.tolist(), strict=True):
            assert by > 0.05 if row.images + row.videos else by < 1e-4, f"{row}: {by}"


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


@torch.no_grad()
def check_depth(name: str, layers: int) -> None:
    """What is peculiar to some layers does not break a model of another depth."""
    tiny = ZOO[name](layers=layers)
    assert tiny.model.config.get_text_config().num_hidden_layers == layers
    assert tiny.model(**tiny.inputs(IMAGES[:1])).logits.isfinite().all()


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
