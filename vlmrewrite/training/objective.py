"""The loss of one step: what the passes of a recipe say that they are trained by."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from vlmrewrite.errors import one_of
from vlmrewrite.hf import encode_images
from vlmrewrite.plan import Pass, blocks_of
from vlmrewrite.runtime import before_labels, following, prompt_ends, session_of
from vlmrewrite.saving import sharing
from vlmrewrite.training.losses import answer_loss, distillation_loss

TRAINED_BY = {
    "terms": "the pass has a method `terms(model, inputs)`: scalars by name, of the model's last call, images encoded;"
    " they are added to the loss",
    "plans": "in each step all rows follow a plan of the dispatch that is drawn at random, so that the blocks serve all"
    " of them",
    "choice": "a trained chooser among plans, whose own loss stands in the model's; data needs answers",
}
"""The words of a pass's ``trained_by``. Whatever they are, the model's loss on answers is part of the loss."""


class Objective:
    """The loss of a batch, and means of its parts since they were last told.

    Args:
        model: that the recipe is applied to.
        distil: weight of the distillation to the unmodified model; 0: none.
        seed: of the plans that are drawn.
        bf16: cast operators to bfloat16; not left to accelerate, which keeps what the process asked for first.

    Raises:
        ValueError: a pass says a word that is none of :data:`TRAINED_BY`.
    """

    def __init__(self, model: Any, *, distil: float, seed: int, bf16: bool) -> None:
        session = session_of(model)
        self.model, self.distil, self.seed, self.bf16 = model, distil, seed, bf16
        self.words = dict.fromkeys(word for p in session.recipe.passes for word in getattr(p, "trained_by", ()))
        if wrong := [word for word in self.words if word not in TRAINED_BY]:
            raise ValueError(f"trained_by says {wrong[0]!r}, {one_of(str(wrong[0]), TRAINED_BY)}")
        self.passes: list[Pass] = [p for p in session.recipe.passes if "terms" in getattr(p, "trained_by", ())]
        weights = () if session.plan.chooser is None else session.plan.chooser.weights
        others = set(blocks_of(model) or ()) - {name.partition(".")[0] for name in weights}
        self.plans = len(session.plan.variants) if "plans" in self.words and others else 0
        self.teacher: Any = sharing(model).eval() if distil else None
        self._sums, self._n = defaultdict[str, float](float), 0

    def losses(self) -> list[str]:
        """The names of the parts, as :meth:`means` tells them."""
        terms = ["terms"] * bool(self.passes) + ["choice"] * ("choice" in self.words)
        return ["answers", *["distillation"] * bool(self.distil), *terms]

    def __call__(self, model: Callable[..., Any], inputs: Mapping[str, Any], step: int) -> Tensor:
        """The loss of a batch, a scalar with gradients, fp32.

        Args:
            model: the model, or a wrapper of it that is to be called in its place.
            inputs: what its forward takes, with labels.
            step: the number of the step, by which a plan is drawn.
        """
        cast = torch.autocast(self.model.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with cast:
            return self._loss(model, inputs, step)

    def _loss(self, model: Callable[..., Any], inputs: Mapping[str, Any], step: int) -> Tensor:
        labels, given = inputs["labels"], dict(inputs)
        if self.passes:
            given = encode_images(self.model, given)
        with contextlib.ExitStack() as stack:
            stack.enter_context(prompt_ends(self.model, before_labels(labels)))
            if self.plans:
                draw = torch.Generator().manual_seed(self.seed + step)
                stack.enter_context(following(self.model, int(torch.randint(self.plans, (), generator=draw))))
            out = model(**given)
        loss: Tensor = out.loss
        parts = {"answers": answer_loss(out.logits.detach(), labels)}
        if "choice" in self.words:
            parts["choice"] = loss.detach() - parts["answers"]
        if self.teacher is not None:
            with torch.no_grad():
                expected = self.teacher(**{name: x for name, x in inputs.items() if name != "labels"}).logits
            parts["distillation"] = distillation_loss(out.logits, expected, labels)
            loss = loss + self.distil * parts["distillation"]
        for p in self.passes:
            terms: Mapping[str, Tensor] = p.terms(self.model, given)  # type: ignore[attr-defined]
            parts |= terms
            loss = loss + sum(terms.values())
        for name, part in parts.items():
            self._sums[name] += float(part.detach())
        self._n += 1
        return loss

    def means(self) -> dict[str, float]:
        """The mean of each part in this process since this was last asked; the distillation's is without its weight."""
        found = {name: total / max(1, self._n) for name, total in self._sums.items()}
        self._sums.clear()
        self._n = 0
        return found
