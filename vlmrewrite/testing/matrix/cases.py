"""The cases that every family is tried in, and the techniques that they are tried with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlmrewrite.api import applied
from vlmrewrite.compiler import rewrite
from vlmrewrite.hf import attending, indexed_mixers
from vlmrewrite.oracle import layer_masks, positioned
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, FastV, Stride
from vlmrewrite.plan import Pass
from vlmrewrite.runtime import trace as captured
from vlmrewrite.testing.agreement import Agreement, extended, forward_agreement, generation_agreement, logits_agreement
from vlmrewrite.testing.matrix.cells import Cell, one_line
from vlmrewrite.testing.models import Row, TinyVLM
from vlmrewrite.testing.models.tiny import text_tokens

LAYERS = 3
"""Of each model's decoder."""

TECHNIQUES: Mapping[str, Pass] = {
    "Stride": Stride(keep=0.5),
    "STS": STS(keep=5, refine=3, at=1),
    "FastV": FastV(keep=0.5, at=1),
    "DPVR": DPVR(),
    "VISOR": VISOR([0], [2]),
    "DAPE": DAPE(budget=0.6),
}


def fitted(tiny: TinyVLM) -> dict[str, Pass]:
    """The techniques as a family is tried with them.

    Those that go by the attention that a layer pays, or let text attend to images in it, take the nearest layer that
    has attention, or keys, the later of two, where some layers have none.
    """
    there = attending(tiny.model)

    def near(layer: int, some: Iterable[int]) -> int:
        return min(some, key=lambda i: (abs(i - layer), -i), default=layer)

    at = near(1, there)
    return dict(TECHNIQUES) | {
        "STS": STS(keep=5, refine=3, at=at),
        "FastV": FastV(keep=0.5, at=at),
        "VISOR": VISOR([0], [near(2, {*there, *indexed_mixers(tiny.model)})]),
    }


IMAGES = [Row(1, 3, 2), Row(2, 1, 3), Row(0, 4, 1)]

VIDEOS = [Row(0, 2, 2, videos=1), Row(2, 1, 3, videos=1), Row(0, 4, 1)]

ALONE = [Row(0, 2, 2, videos=1), Row(0, 1, 3, videos=2), Row(0, 4, 1)]
"""Videos for models that take no images beside them."""

ONE_EACH = [Row(1, 3, 2), Row(1, 1, 5)]  # generate() gives the beams of a row with several images the wrong ones

NEW, BEAMS = 3, 2

GREEDY: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}

Answered = tuple[dict[str, Any], Tensor]
"""Inputs of one forward over the whole sequence, and the logits [B, n, V] that came out for the last n tokens of it."""


@dataclass(frozen=True)
class Case:
    """One way to call a model.

    Attributes:
        what: what is done, in a line.
        rows: the prompts.
        check: compares a rewritten model with the oracle; None where there is nothing to compare.
        unmodified: the same with the unmodified model, whose answer must be its own forward's.
        instead: the prompts for models that raise for `rows`; none: there are no others.
    """

    what: str
    rows: Sequence[Row]
    check: Callable[[TinyVLM, dict[str, Any], Pass], Agreement | None]
    unmodified: Callable[[TinyVLM, dict[str, Any]], Answered | None]
    instead: Sequence[Row] = ()

    @torch.no_grad()
    def fitting(self, tiny: TinyVLM) -> tuple[Case, str | None]:
        """The case with prompts that the unmodified model takes; where they are the others, why."""
        if not self.instead:
            return self, None
        try:
            tiny.model(**tiny.inputs(self.rows))
        except Exception as e:
            return replace(self, rows=self.instead), one_line(f"{type(e).__name__}: {e}")
        return self, None

    def lacking(self, tiny: TinyVLM) -> str | None:
        """Why the family cannot be tried in this case at all, or None."""
        if tiny.clips is None and any(row.videos for row in self.rows):
            return "the family takes no videos"
        return None

    @torch.no_grad()
    def amiss(self, tiny: TinyVLM) -> Cell | None:
        """What the cells come to because of the unmodified model, or None.

        Where it raises, there is nothing to rewrite; where its answer is not its own forward's over the same tokens,
        the oracle, which is that forward, cannot judge.
        """
        try:
            found = self.unmodified(tiny, tiny.inputs(self.rows))
            if found is None:
                return None
            whole, got = found
            with positioned(tiny.model, whole) as given:
                expected = tiny.model(**given).logits[:, -got.shape[1] :]
        except Exception as e:
            return Cell("absent", reason=one_line(f"the unmodified model: {type(e).__name__}: {e}"))
        off, scale = float((got - expected).abs().max()), float(expected.abs().max())
        if off <= 1e-4 * scale:
            return None
        told = f"the unmodified model's logits are {off:.2g} off those of its own forward over the same tokens"
        return Cell("failed", reason=f"not judged: {told}")


def _trace(tiny: TinyVLM, inputs: dict[str, Any], technique: Pass) -> None:
    rewrite(captured(tiny.model, inputs), technique, strict=True)


def _prefill(tiny: TinyVLM, inputs: dict[str, Any], technique: Pass) -> Agreement:
    return forward_agreement(tiny.model, inputs, technique)


def _generate(tiny: TinyVLM, inputs: dict[str, Any], technique: Pass) -> Agreement:
    return generation_agreement(tiny.model, inputs, technique, NEW)


def _video(tiny: TinyVLM, inputs: dict[str, Any], technique: Pass) -> Agreement:
    first, then = _prefill(tiny, inputs, technique), _generate(tiny, inputs, technique)
    larger = max(first, then, key=lambda x: x.error / x.tolerance)
    return replace(then, error=larger.error, tolerance=larger.tolerance)


def _turns(tiny: TinyVLM, inputs: dict[str, Any], technique: Pass) -> Agreement:
    with torch.no_grad(), applied(tiny.model, technique, strict=True):
        tokens, got = conversation(tiny, inputs)
        masks = layer_masks(tiny.model, inputs["input_ids"].shape[1] + tokens.shape[1])
    return logits_agreement(tiny.model, extended(tiny.model, inputs, tokens), masks, got)


def _beams(tiny: TinyVLM, inputs: dict[str, Any], technique: Pass) -> Agreement:
    """The masks are those of the rows alone: a beam keeps what its row keeps."""
    with torch.no_grad(), applied(tiny.model, technique, strict=True):
        tokens, got = beams(tiny, inputs)
        tiny.model.generate(**inputs, do_sample=False, max_new_tokens=1)
        masks = layer_masks(tiny.model, inputs["input_ids"].shape[1] + tokens.shape[1])
    return logits_agreement(tiny.model, extended(tiny.model, inputs, tokens), masks, got)


def _forward(tiny: TinyVLM, inputs: dict[str, Any]) -> None:
    tiny.model(**inputs)


def answers(tiny: TinyVLM, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """New tokens but the last, int64 [B, n - 1], and the logits of all, [B, n, V]."""
    out = tiny.model.generate(**inputs, **GREEDY, max_new_tokens=NEW, min_new_tokens=NEW)
    return out.sequences[:, inputs["input_ids"].shape[1] : -1], torch.stack(out.logits, 1)


def conversation(tiny: TinyVLM, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """An answer, a question without an image and an answer to it, on a kept cache.

    Returns:
        the tokens behind the prompt but the last, int64 [B, n], and the logits of the second answer, [B, NEW, V].
    """
    model, prompt = tiny.model, inputs["input_ids"].shape[1]
    first = model.generate(**inputs, **GREEDY, max_new_tokens=2, min_new_tokens=2)
    generator = torch.Generator().manual_seed(1)
    question = torch.tensor([text_tokens(3, generator) for _ in first.sequences])
    ids = torch.cat([first.sequences, question], 1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ids.shape[1] - prompt), value=1)
    how = GREEDY | {"past_key_values": first.past_key_values, "max_new_tokens": NEW, "min_new_tokens": NEW}
    again = model.generate(input_ids=ids, attention_mask=mask, **how)
    return again.sequences[:, prompt:-1], torch.stack(again.logits, 1)


def beams(tiny: TinyVLM, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """As :func:`answers`, of each row's best beam."""
    how = GREEDY | {"num_beams": BEAMS, "max_new_tokens": NEW, "min_new_tokens": NEW}
    out = tiny.model.generate(**inputs, **how)
    steps = zip(out.logits, out.beam_indices.unbind(1), strict=True)
    return out.sequences[:, inputs["input_ids"].shape[1] : -1], torch.stack([x[beam] for x, beam in steps], 1)


def _whole(run: Callable[[TinyVLM, dict[str, Any]], tuple[Tensor, Tensor]]) -> Callable[..., Answered]:
    def unmodified(tiny: TinyVLM, inputs: dict[str, Any]) -> Answered:
        tokens, got = run(tiny, inputs)
        return extended(tiny.model, inputs, tokens), got

    return unmodified


CASES: Mapping[str, Case] = {
    "trace": Case("vr.rewrite(vr.trace(...)): captured and rewritten, not run", IMAGES, _trace, _forward),
    "prefill": Case("a forward over a padded batch, one to two images a row and none", IMAGES, _prefill, _forward),
    "generate": Case("generate() for that batch, with a cache", IMAGES, _generate, _whole(answers)),
    "video": Case("prefill and generate() with videos, and images beside them", VIDEOS, _video, _whole(answers),
                  ALONE),
    "turns": Case("generate() for that batch, then a second question on the kept cache", IMAGES, _turns,
                  _whole(conversation)),
    "beams": Case(f"generate() with {BEAMS} beams for a padded batch", ONE_EACH, _beams, _whole(beams)),
}  # fmt: skip
"""The cases, in the order in which they are tried."""
