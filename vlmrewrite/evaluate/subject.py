"""What is evaluated: the model as it is or under a recipe, and what it does with a batch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from vlmrewrite.api import applied, processor_set, report, resumed
from vlmrewrite.clock import Seconds, clock_of, now
from vlmrewrite.evaluate.asking import encode
from vlmrewrite.evaluate.sample import Sample
from vlmrewrite.hf import base_model_of, language_model, refuse_one_size, refuse_smaller
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.report import captured
from vlmrewrite.runtime import Session, session_of

UNMODIFIED = "unmodified"


@dataclass
class Answered:
    """What came out of a batch.

    Attributes:
        outputs: text of each row, without special tokens.
        tokens: ids of each row, up to the end of its text.
        first: log-probabilities of the first token, fp32 [B, V].
        prefill: seconds to the logits of the first token, from when the images are encoded.
        decode: seconds for each token behind it; None if there was none.
        costs: FLOPs and K/V bytes of the prefill, and those of the unmodified model; None for it itself.
        pictures: of each row, for each image what :func:`vlmrewrite.evaluate.page.picture` draws.
        refused: passes that did nothing, and why.
    """

    outputs: list[str]
    tokens: list[list[int]]
    first: Tensor
    prefill: float
    decode: float | None
    costs: dict[str, list[float]] | None = None
    pictures: list[list[dict[str, Any]]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def no_numbers(self, row: int) -> str | None:
        """What is wrong with a row whose logits are NaN or all infinite, or None."""
        first = self.first[row]
        wrong = not bool(first.isfinite().any()) or bool(first.isnan().any())
        return "the logits of the first token are not numbers" if wrong else None


class Subject:
    """The model as it is, or under a recipe that is at work while it answers, and only then."""

    def __init__(self, model: Any, processor: Any, recipe: Any = None, **options: Any) -> None:
        """Apply a recipe to see that it can be, and take it back.

        Args:
            model: unmodified.
            processor: the model's.
            recipe: what :func:`vlmrewrite.apply` takes, a folder of trained blocks being called by its name; None: the
                model as it is.
            options: for :func:`vlmrewrite.apply`.

        Raises:
            ValueError: the recipe, the blocks or the model cannot be used.
        """
        self.base, self.processor = base_model_of(model), processor
        self.model: Any = model if isinstance(model, nn.Module) else self.base  # a pipeline does not generate
        self.name, self.recipe = UNMODIFIED, ""
        self.session: Session | None = None
        self._warm, self._graphs = False, 0
        if recipe is None:
            return
        with processor_set(), applied(self.base, recipe, **options):
            self.session = session_of(self.base)
            blocks = getattr(self.base, ATTRIBUTE, None)
        self.processor, self._own = self.session.recipe.processor(processor), processor
        self.name, self.recipe = self.session.recipe.name, repr(self.session.recipe.passes)
        if isinstance(recipe, str | os.PathLike) and Path(recipe).is_dir():
            self.name = Path(recipe).resolve().name
        if blocks is not None:
            self.recipe += f", blocks {numbers_of(blocks)}"

    def try_pictures(self, sample: Sample) -> None:
        """Raise ValueError if the recipe makes pictures smaller and the model cannot encode these, with the reason."""
        if self.session is None or self.processor is self._own:
            return
        try:
            refuse_smaller(self.base, encode(self.processor, [sample]).to(self.base.device))
        except ValueError as e:
            raise ValueError(f"{self.name}: {e}") from e

    def try_size(self) -> None:
        """The same with a picture that is made up, as far as one can be, where samples are yet to come."""
        if self.session is None or self.processor is self._own:
            return
        try:
            refuse_one_size(self.base, self._own, self.processor)
        except ValueError as e:
            raise ValueError(f"{self.name}: {e}") from e

    def answer(self, inputs: Any, longest: int, whole: Any = None) -> Answered:
        """Answer a batch greedily; where a graph had to be captured for it, a second time, which counts.

        Args:
            inputs: as the processor gives them.
            longest: tokens of an answer.
            whole: the same as the model's own processor gives them, if this one's is another.
        """
        given = dict(inputs.to(self.base.device, dtype=self.base.dtype))
        if self.session is None:
            made = self._generate(given, longest)
            if not self._warm:
                self._warm, made = True, self._generate(given, longest)
            return made
        with resumed(self.base, self.session):
            made, said = self._generate(given, longest), report(self.base)
            graphs = said.graphs.get("captured", 0)
            if not self._warm or graphs != self._graphs:
                self._warm, self._graphs = True, graphs
                made, said = self._generate(given, longest), report(self.base)
        made.refused = [f"{x['configuration']}: {x['reason']}" for x in said.passes if x["reason"]]
        made.costs = {key: [said.totals[when][key] for when in ("after", "before")] for key in ("flops", "kv_bytes")}
        if whole is not None:
            before = plain_costs(self.base, whole)
            made.costs = {key: [after, before[key]] for key, (after, _) in made.costs.items()}
        made.pictures = _pictures(said.kept, len(made.outputs))
        return made

    def generate(self, inputs: Any, longest: int) -> Answered:
        """Answer a batch greedily, once, without costs."""
        given = dict(inputs.to(self.base.device, dtype=self.base.dtype))
        if self.session is None:
            return self._generate(given, longest)
        with resumed(self.base, self.session):
            return self._generate(given, longest)

    def peak(self) -> dict[str, int]:
        """Peak bytes of the last prefill ``before`` and ``after``, as the report predicts them."""
        if self.session is None:
            return {}
        with resumed(self.base, self.session):
            return report(self.base, memory=True).memory

    def _generate(self, given: dict[str, Any], longest: int) -> Answered:
        clock = clock_of(self.base.device)
        watch = _Watch()
        self.model.generate(
            **given,
            max_new_tokens=longest,
            do_sample=False,
            num_beams=1,
            logits_processor=LogitsProcessorList([watch]),
            streamer=watch,
        )
        tokens = [_until(row, end_tokens(self.base)) for row in torch.stack(watch.tokens, 1).tolist()]
        decode = getattr(watch.last.since(watch.told), clock) / (watch.steps - 1) if watch.steps > 1 else None
        return Answered(
            [text.strip() for text in self.processor.batch_decode(tokens, skip_special_tokens=True)],
            tokens,
            watch.first,
            getattr(watch.reached.since(watch.begun), clock),
            decode,
        )


def plain_costs(model: Any, inputs: Any) -> dict[str, float]:
    """FLOPs and K/V bytes of an unmodified model's prefill, which is not run, but for its images."""
    with torch.no_grad():
        [program] = captured(model, dict(inputs.to(model.device, dtype=model.dtype)))
    assert program.call is not None
    costs = program.costs(program.call.counts)
    return {"flops": sum(c.flops for c in costs), "kv_bytes": sum(c.kv_bytes for c in costs)}


class _Watch(LogitsProcessor, BaseStreamer):
    """Sees when the prompt is ready, and logits and tokens of each step, changes none, and looks at the clock.

    Tokens are taken from here, for what ``generate()`` returns begins with the prompt in some models and not in others.
    """

    def __init__(self) -> None:
        self.steps, self.tokens = 0, list[Tensor]()
        self.first: Tensor = torch.empty(0)
        self.begun = self.reached = self.told = self.last = Seconds(0, 0)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.last = now()
        if not self.steps:
            self.reached = self.last
            self.first = scores.float().log_softmax(-1)
            self.told = now()
        self.steps += 1
        return scores

    def put(self, value: Tensor) -> None:
        """The prompt, once images are encoded, before the first forward; then the tokens of each step, [B]."""
        if self.begun.wall:
            self.tokens.append(value)
        else:
            self.begun = now()

    def end(self) -> None:
        """Nothing is left to do."""


def numbers_of(module: nn.Module) -> str:
    """A hash of the names and shapes of parameters, and of the first numbers of each that is a plain tensor."""
    digest = hashlib.sha256()
    for name, p in module.named_parameters():
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        if type(p.data) is Tensor and p.numel():
            digest.update(repr(p.detach().flatten()[:8].tolist()).encode())
    return digest.hexdigest()[:16]


def divergence(before: Tensor, after: Tensor) -> list[float]:
    """KL of the second from the first for each row, in nats.

    Args:
        before, after: log-probabilities, [B, V].
    """
    p = before.exp()
    terms = torch.where(p > 0, p * (before - after), 0.0)
    return [max(0.0, x) for x in terms.sum(-1).tolist()]


def end_tokens(model: Any) -> set[int]:
    """The tokens that end a text, of the model and of a language model in it that generates; none if none is named."""
    found = set[int]()
    for part in filter(None, (model, language_model(model))):
        ends = part.generation_config.eos_token_id
        found |= set(ends) if isinstance(ends, list) else {ends} - {None}
    return found


def _until(ids: Sequence[int], ends: set[int]) -> list[int]:
    """Ids up to the first that ends a text, and with it."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids))
    return list(ids[: stop + 1])


def _pictures(kept: Any, rows: int) -> list[list[dict[str, Any]]]:
    """Which tokens of each image of each row were worked on, as plain values; of a video each frame is an image."""
    found: list[list[dict[str, Any]]] = [[] for _ in range(rows)]
    if kept is None:
        return found
    places = [int(name.split(",")[0].removeprefix("row ")) for name in kept.names]
    start = 0
    for row, grids, sizes in zip(places, kept.frames, kept.sizes, strict=True):
        for (high, wide), n in zip(grids, sizes, strict=True):
            stages = {title: "".join(map(str, tokens[start : start + n])) for title, tokens in kept.stages}
            found[row].append({"rows": high, "columns": wide, "stages": stages, "placed": kept.unknown is None})
            start += n
    return found
