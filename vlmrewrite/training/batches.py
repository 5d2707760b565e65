"""Samples with answers as batches that a model is trained on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmrewrite.evaluate import Sample, answer_tokens, encode


def answered(processor: Any, samples: Sequence[Sample], ends: Collection[int]) -> dict[str, Tensor]:
    """Model inputs of samples and the first answer of each, with labels on the answers alone.

    Prompts are those that :func:`vlmrewrite.evaluate` asks, answers stand right behind them, and padding behind both.

    Args:
        processor: the model's.
        samples: with answers.
        ends: tokens that end a text, one at least.

    Returns:
        what a forward takes; ``labels`` int64 [B, T], -100 but for answers.

    Raises:
        ValueError, OSError: as :func:`vlmrewrite.evaluate.encode`; or a sample has no answer, or no token ends a text.
    """
    if not ends:
        raise ValueError(
            "expected a model whose generation_config names the token that ends a text (eos_token_id), got none"
        )
    if bare := [s.id for s in samples if not s.answers]:
        raise ValueError(f"expected samples with an answer, got {bare[0]!r} without")
    try:
        given = dict(encode(processor, samples))
    except OSError:
        refuse_damaged(samples)
        raise
    shape, mask = given["input_ids"].shape, given["attention_mask"].bool()
    answers = [torch.tensor(answer_tokens(processor, s, ends)) for s in samples]
    length = max(int(row.sum()) + len(answer) for row, answer in zip(mask, answers, strict=True))
    given["labels"] = torch.full(shape, -100)
    fill: dict[str, Any] = {"input_ids": answers, "attention_mask": [torch.ones_like(a) for a in answers]}
    fill["labels"] = answers
    padding = {"input_ids": processor.tokenizer.pad_token_id or 0, "labels": -100}
    for name, x in given.items():
        if isinstance(x, Tensor) and x.shape == shape:
            behind = fill.get(name, [torch.zeros_like(a) for a in answers])
            rows = [torch.cat([row[real], a.to(x)]) for row, real, a in zip(x, mask, behind, strict=True)]
            short = padding.get(name, 0)
            given[name] = torch.stack([torch.nn.functional.pad(r, (0, length - len(r)), value=short) for r in rows])
    return given


def refuse_damaged(samples: Sequence[Sample]) -> None:
    """Decode every image once.

    Raises:
        OSError: one cannot be, though it can be opened; says of which sample.
    """
    for sample in samples:
        try:
            sample.pictures()
        except Exception as e:  # Pillow raises many kinds
            raise OSError(f"sample {sample.id!r}: expected whole images: {e}: take it out of the data") from e
