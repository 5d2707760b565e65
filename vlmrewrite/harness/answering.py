"""A model of transformers, as it is or under a recipe, that answers batches of samples."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, BatchFeature

from vlmrewrite.api import applied_recipe, apply, processor_set
from vlmrewrite.errors import one_of
from vlmrewrite.evaluate import Sample, encode, end_tokens
from vlmrewrite.harness.settings import Settings
from vlmrewrite.saving import FILE
from vlmrewrite.training import answered, before_labels, prompt_ends

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Answering:
    """Answers samples.

    Attributes:
        model: in eval mode, with the recipe applied.
        processor: its, as the recipe needs it.
    """

    def __init__(
        self, pretrained: str, recipe: str | None, device: torch.device, dtype: str = "auto", **options: Any
    ) -> None:
        """Load a model and apply a recipe.

        Args:
            pretrained: folder, or repository of the Hub.
            recipe: a text that :func:`vlmrewrite.apply` takes; None: the model as it is.
            device: where it runs.
            dtype: one of :data:`DTYPES`; ``"auto"`` is float32 on a CPU, elsewhere what the model was saved in.
            options: ``revision`` and ``trust_remote_code`` for ``from_pretrained``; others for
                :func:`vlmrewrite.apply`.

        Raises:
            ValueError: the recipe cannot be applied, or there is no such dtype; or a recipe was saved with the model
                and none is named.
            OSError: what transformers raises where it finds no model.
        """
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}, {one_of(dtype, DTYPES)}")
        if recipe is None and (Path(pretrained) / FILE).is_file():
            raise ValueError(f"{pretrained} holds a recipe: expected recipe={pretrained}, or a model alone")
        source = {key: options.pop(key) for key in ("revision", "trust_remote_code") if key in options}
        named = "float32" if dtype == "auto" and device.type == "cpu" else dtype
        model: Any = AutoModelForImageTextToText.from_pretrained(pretrained, dtype=named, **source)
        self.model, self.processor = model.to(device).eval(), AutoProcessor.from_pretrained(pretrained, **source)
        self.recipe = recipe
        if recipe is not None:
            with processor_set():
                apply(self.model, recipe, **options)
            self.processor = applied_recipe(self.model).processor(self.processor)

    def answers(self, samples: Sequence[Sample], settings: Settings) -> list[tuple[str, int]]:
        """What the model says to samples, and of how many tokens that is.

        Args:
            samples: all with pictures, or all without.
            settings: of ``generate()``.

        Raises:
            ValueError, OSError: as :func:`vlmrewrite.evaluate.encode`.
        """
        given = self._on_device(self._encode(samples))
        ids = self.model.generate(**given, **settings.arguments)
        asked = given["input_ids"]
        if ids.shape[1] > asked.shape[1] and torch.equal(ids[:, : asked.shape[1]], asked):  # some models leave it out
            ids = ids[:, asked.shape[1] :]
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        ends = torch.tensor(sorted(end_tokens(self.model)), device=ids.device)
        ended = torch.isin(ids, ends).cumsum(1).cumsum(1) <= 1  # up to the first end, and with it
        return [(settings.cut(text), int(n)) for text, n in zip(texts, ended.sum(1).tolist(), strict=True)]

    @torch.no_grad()
    def losses(self, samples: Sequence[Sample]) -> list[tuple[float, bool]]:
        """How unlikely the first answer of each sample is, and whether it is what the model says by itself.

        Tokens and plans are chosen by the prompt, as in ``generate()``; the answer has no part in that.

        Args:
            samples: with answers, and with pictures all or none.

        Returns:
            negative log-likelihood per token, in nats, and whether each token is the likeliest.

        Raises:
            ValueError, OSError: as :func:`vlmrewrite.training.answered`.
        """
        given = self._on_device(answered(self.processor, samples, end_tokens(self.model)))
        labels = given.pop("labels")
        told: AbstractContextManager[Any] = contextlib.nullcontext()
        if self.recipe is not None:
            told = prompt_ends(self.model, before_labels(labels))
        with told:
            logits = self.model(**given, use_cache=False).logits
        has = labels[:, 1:] != -100
        predicted, wanted = logits[:, :-1][has].float().log_softmax(-1), labels[:, 1:][has]
        loss = -predicted.gather(-1, wanted[:, None]).squeeze(-1)
        right = predicted.argmax(-1) == wanted
        lengths = has.sum(1).tolist()
        rows = zip(loss.split(lengths), right.split(lengths), strict=True)
        return [(float(of.mean()), bool(hits.all())) for of, hits in rows]

    def _encode(self, samples: Sequence[Sample]) -> Any:
        if samples[0].images or getattr(self.processor, "chat_template", None):
            return encode(self.processor, samples)
        texts = [sample.prompt for sample in samples]
        return self.processor(text=texts, return_tensors="pt", padding=True, padding_side="left")

    def _on_device(self, given: Any) -> dict[str, Any]:
        """Tensors where the model is, those of numbers in its dtype."""
        return dict(BatchFeature(dict(given)).to(self.model.device, dtype=self.model.dtype))
