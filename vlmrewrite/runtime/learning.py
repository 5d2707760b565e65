"""What a trained chooser of a dispatch learns by, in calls with labels.

Its choice is discrete, so that the model's loss has no gradient in its parameters. So each plan is run without
gradient, and how many labels it predicts says which choice would have been right: the chooser's own loss is added to
the model's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmrewrite.plan import Plan, blocks_of
from vlmrewrite.runtime.facts import Prompt

Forward = Callable[[Prompt, dict[str, Any]], Any]


def learning(
    model: nn.Module, plan: Plan, forward: Forward, told: Prompt, prompt: Prompt, kwargs: dict[str, Any]
) -> Any:
    """A forward, and if a chooser learns in it, its loss in that of the output.

    Args:
        model: rewritten.
        plan: the recipe's.
        forward: the model's, of a prompt and arguments.
        told: gets what a forward with images was.
        prompt, kwargs: of this call.
    """
    labels, choose = kwargs.get("labels"), _loss_of(model, plan)
    if choose is None or not isinstance(labels, Tensor) or kwargs.get("past_key_values") is not None:
        return forward(prompt, kwargs)
    with torch.no_grad():
        each = [forward(replace(prompt, follows=i), dict(kwargs)) for i in range(len(plan.variants))]
        found = torch.stack([right_labels(out.logits, labels) for out in each], 1)
    before, out, wanted = told.made, forward(prompt, kwargs), labels[:, 1:] != -100
    ran = told.made
    if ran is None or ran is before:  # there was no image, and nothing to choose
        return out
    asked = wanted.any(1) & ran.call.with_images
    if bool(asked.any()):
        assert ran.result.value is not None
        of = kwargs.get("num_items_in_batch")  # labels of all batches that are accumulated
        share = 1.0 if of is None else float(wanted.sum() / of)
        out["loss"] = out.loss + share * choose(ran.result.value[asked], found[asked])
    return out


def right_labels(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels are the most likely next token, int64 [B].

    Args:
        logits: [B, T, V].
        labels: int64 [B, T], -100 for none; that of a column is predicted in the one before.
    """
    wanted = labels[:, 1:].to(logits.device)
    return (logits[:, :-1].argmax(-1) == wanted).sum(1)


def _loss_of(model: nn.Module, plan: Plan) -> Callable[[Tensor, Tensor], Tensor] | None:
    """That of the plan's chooser, if it has one and its parameters learn in this call."""
    blocks, found = blocks_of(model), getattr(plan.chooser, "loss", None)
    if plan.chooser is None or blocks is None or found is None or not torch.is_grad_enabled():
        return None
    learns = any(blocks.get_parameter(name).requires_grad for name in plan.chooser.weights)
    return found if learns else None
