"""Losses on the tokens of answers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def answer_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of the labels, a mean over them, as models of transformers compute it; in nats.

    Args:
        logits: [B, T, V]; those of a column are for the next one.
        labels: int64 [B, T], -100 for none.
    """
    at = labels[:, 1:] != -100
    return F.cross_entropy(logits[:, :-1][at].float(), labels[:, 1:][at])


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL of the student's next tokens from the teacher's, a mean over the tokens of answers; in nats.

    ``temperature^2 KL(softmax(teacher / temperature) || softmax(student / temperature))`` (Hinton et al., 2015).

    Args:
        student, teacher: logits [B, T, V]; gradients flow into the student's alone.
        labels: int64 [B, T], -100 where there is no answer.
        temperature: by which logits are divided.

    Raises:
        ValueError: shapes differ, or the temperature is not positive.
    """
    if student.shape != teacher.shape or student.shape[:2] != labels.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (student, teacher, labels))
        raise ValueError(f"expected logits [B, T, V], the same of both, and labels [B, T], got {shapes}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; expected a number greater than 0")
    at = labels[:, 1:] != -100
    q, p = ((x[:, :-1][at].float() / temperature).log_softmax(-1) for x in (student, teacher.detach()))
    return F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean() * temperature**2 if len(q) else q.sum()
