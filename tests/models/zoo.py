"""What is asked of every builder of a tiny model: it is deterministic, sane, batched as rows alone, and it looks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from vlmrewrite.testing.models import ZOO, Row, Side, TinyVLM

IMAGES = [Row(1, 3, 2), Row(2, 1, 3), Row(0, 4, 1)]
VIDEOS = [Row(0, 2, 2, videos=1), Row(0, 1, 3, videos=1), Row(0, 3, 1)]
MIXED = [Row(0, 2, 2, videos=1), Row(1, 1, 3, videos=1), Row(2, 3, 1)]

build = functools.cache(lambda name: ZOO[name]())


def batches(tiny: TinyVLM, mixed: bool = True) -> list[list[Row]]:
    """The batches a family is tried with; ``mixed``: it takes images and videos at once."""
    return [IMAGES] if tiny.clips is None else [IMAGES, VIDEOS, MIXED] if mixed else [IMAGES, VIDEOS]


def check_same_seed_same_model(name: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = build(name), ZOO[name](), ZOO[name](seed=1)
    assert first.name == name
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [list(tiny.model.parameters()) for tiny in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(*weights[:2], strict=True))
    assert all(not torch.equal(a, b) for a, b in zip(*weights[1:], strict=True))
    a, b, c = first.inputs(IMAGES, seed=3), again.inputs(IMAGES, seed=3), first.inputs(IMAGES, seed=4)
    assert all(same(a[k], b[k]) for k in a)
    assert any(not same(a[k], c[k]) for k in a if k != "input_ids")


def same(a: Any, b: Any) -> bool:
    """Whether two inputs of a model are the same."""
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def darker(inputs: dict[str, Any]) -> dict[str, Any]:
    """Other images: darker where they are bright, in another proportion each, for a norm may come first.

    Bright is what is positive; numbers of rows and columns stay as they are.
    """
    floats = {k for k, v in inputs.items() if isinstance(v, Tensor) and v.is_floating_point() and "mask" not in k}
    return {k: torch.where(v > 0, v * v / 4, v) if k in floats else v for k, v in inputs.items()}


@torch.no_grad()
def check_sane_and_looks(name: str, mixed: bool = True) -> None:
    tiny = build(name)
    for rows in batches(tiny, mixed):
        for side in ("right", "left"):
            inputs = tiny.inputs(rows, side=side)
            logits = tiny.model(**inputs).logits
            assert logits.shape[:2] == inputs["input_ids"].shape
            real = logits[inputs["attention_mask"].bool()]
            assert bool(real.isfinite().all())
            spread = float(real[real > torch.finfo(real.dtype).min].std())  # the least: tokens that are never next
            assert 0.3 < spread < 10, spread
        change = (tiny.model(**darker(inputs)).logits - logits)[:, -1].abs().amax(-1)
        for row, by in zip(rows, change.tolist(), strict=True):
            assert by > 0.05 if row.images + row.videos else by < 1e-4, f"{row}: {by}"


def single(tiny: TinyVLM, mixed: bool, text: bool) -> set[Row]:
    """Rows to try alone; without ``text``, those that have something to look at."""
    return {r for rows in batches(tiny, mixed) for r in rows if text or r.images + r.videos}


def alone_and_batched(tiny: TinyVLM, row: Row, side: Side = "left") -> tuple[dict[str, Any], dict[str, Any]]:
    """A row, and the same row before a longer one of text, for which it is padded."""
    alone = tiny.inputs([row])
    batch = tiny.inputs([row, Row(0, alone["input_ids"].shape[1], 3)], side=side)
    real = batch["attention_mask"][0].bool()
    assert torch.equal(batch["input_ids"][0, real], alone["input_ids"][0])
    assert int((~real).sum()) == 3
    return alone, batch


@torch.no_grad()
def check_rows_alone(name: str, mixed: bool = True, text: bool = True, side: Side = "left") -> None:
    tiny = build(name)
    for row in single(tiny, mixed, text):
        expected, got = (
            tiny.model(**inputs).logits[0, inputs["attention_mask"][0].bool()]
            for inputs in alone_and_batched(tiny, row, side)
        )
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0, msg=lambda m, row=row: f"{row}: {m}")


def check_generation(name: str, mixed: bool = True, text: bool = True, alone: bool = True) -> None:
    tiny = build(name)
    for rows in batches(tiny, mixed):
        assert generated(tiny, tiny.inputs(rows)).shape == (len(rows), 3)
    for row in single(tiny, mixed, text) if alone else ():
        expected, got = (generated(tiny, inputs)[0] for inputs in alone_and_batched(tiny, row))
        assert torch.equal(expected, got), f"{row}: {expected}, {got}"


def generated(tiny: TinyVLM, inputs: dict[str, Any]) -> Tensor:
    return tiny.model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, -3:]


@torch.no_grad()
def check_depth(name: str, layers: int) -> None:
    """What is peculiar to some layers does not break a model of another depth."""
    tiny = ZOO[name](layers=layers)
    assert tiny.model.config.get_text_config().num_hidden_layers == layers
    assert bool(tiny.model(**tiny.inputs(IMAGES[:1])).logits.isfinite().all())
