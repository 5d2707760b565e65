"""What is asked of every builder of a tiny model: it is deterministic, sane, batched as rows alone, and it looks."""

from __future__ import annotations

import functools
from typing import Any

import torch

from vlmrewrite.testing.models import ZOO, Row, TinyVLM

IMAGES = [Row(1, 3, 2), Row(2, 1, 3), Row(0, 4, 1)]
VIDEOS = [Row(0, 2, 2, videos=1), Row(1, 1, 3, videos=1), Row(0, 3, 1)]
NEIGHBOUR = Row(0, 60, 9)
"""A longer row of text. The images and the text in front of it are made as without it."""

build = functools.cache(lambda name: ZOO[name]())


def rows_of(tiny: TinyVLM, mixed: bool = True) -> list[list[Row]]:
    """The batches a family is tried with; ``mixed`` ones hold images and videos."""
    videos = [row for row in VIDEOS if mixed or not (row.images and row.videos)]
    return [IMAGES] if tiny.clips is None else [IMAGES, videos]


# ---- what every family is asked


def check_same_seed_same_model(name: str) -> None:
    before = torch.random.get_rng_state()
    first, again, other = build(name), ZOO[name](), ZOO[name](seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    weights = [list(tiny.model.parameters()) for tiny in (first, again, other)]
    assert all(torch.equal(a, b) for a, b in zip(*weights[:2], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(*weights[1:], strict=True))
    a, b, c = first.inputs(IMAGES, seed=3), again.inputs(IMAGES, seed=3), first.inputs(IMAGES, seed=4)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(a[k].shape != c[k].shape or not torch.equal(a[k], c[k]) for k in a if a[k].is_floating_point())


@torch.no_grad()
def check_sane_and_looks(name: str, mixed: bool = True) -> None:
    tiny = build(name)
    for rows in rows_of(tiny, mixed):
        inputs = tiny.inputs(rows, side="left")
        logits = tiny.model(**inputs).logits[inputs["attention_mask"].bool()]
        assert bool(logits.isfinite().all())
        assert 0.3 < float(logits.std()) < 10
        last = tiny.model(**inputs).logits[:, -1]
        redrawn = {k: torch.randn_like(v) for k, v in inputs.items() if v.is_floating_point() and v.dim() > 1}
        others = tiny.model(**inputs | redrawn)
        change = (others.logits[:, -1] - last).abs().amax(-1)
        for row, by in zip(rows, change.tolist(), strict=True):
            assert by > 0.05 if row.images + row.videos else by < 1e-4, f"{row}: {by}"


@torch.no_grad()
def check_rows_alone(name: str, mixed: bool = True, side: Any = "left") -> None:
    tiny = build(name)
    for row in {row for rows in rows_of(tiny, mixed) for row in rows}:
        alone, batch = tiny.inputs([row]), tiny.inputs([row, NEIGHBOUR], side=side)
        real = batch["attention_mask"][0].bool()
        assert torch.equal(batch["input_ids"][0, real], alone["input_ids"][0]), "the neighbour changed the row"
        assert not real.all(), f"{row} has no padding beside {NEIGHBOUR}"
        expected, got = (tiny.model(**inputs).logits[0] for inputs in (alone, batch))
        torch.testing.assert_close(got[real], expected, atol=1e-4, rtol=0, msg=lambda m, row=row: f"{row}: {m}")


def check_generation(name: str, mixed: bool = True, alike: bool = True) -> None:
    tiny = build(name)
    how = {"max_new_tokens": 3, "do_sample": False}
    for rows in rows_of(tiny, mixed):
        inputs = tiny.inputs(rows)
        out = tiny.model.generate(**inputs, **how)
        assert out.shape == (len(rows), inputs["input_ids"].shape[1] + 3)
    for row in {row for rows in rows_of(tiny, mixed) for row in rows if alike}:
        alone, batch = (tiny.model.generate(**tiny.inputs(rows), **how) for rows in ([row], [row, NEIGHBOUR]))
        assert torch.equal(alone[0, -3:], batch[0, -3:]), f"{row}: {alone[0, -3:]}, {batch[0, -3:]}"
