"""Losses on answers, where prompts end, and answers as a model is to give them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from vlmrewrite.evaluate import Sample, answer_tokens
from vlmrewrite.passes.visor.dispatch import cheapest
from vlmrewrite.training import answer_loss, before_labels, distillation_loss

LABELS = torch.tensor([[-100, -100, 3, 1], [-100, 2, -100, -100]])


def logits(seed: int) -> torch.Tensor:
    return torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def test_the_loss_of_answers_is_that_of_transformers() -> None:
    given = logits(0)
    expected = [-given[r, c].log_softmax(-1)[t] for r, c, t in ((0, 1, 3), (0, 2, 1), (1, 0, 2))]
    torch.testing.assert_close(answer_loss(given, LABELS), sum(expected) / 3)


def test_distillation_is_the_mean_divergence_over_answers() -> None:
    student, teacher = logits(0), logits(1)
    found = distillation_loss(student, teacher, LABELS)
    expected = 0.0
    for r, c in ((0, 1), (0, 2), (1, 0)):
        p, q = teacher[r, c].softmax(-1).tolist(), student[r, c].softmax(-1).tolist()
        expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert found.item() == pytest.approx(expected / 3, rel=1e-5)
    assert distillation_loss(student, student, LABELS).item() == pytest.approx(0, abs=1e-6)
    found.backward()
    assert teacher.grad is None and student.grad is not None
    assert not student.grad[0, 0].any() and student.grad[0, 1].any(), "the gradient is of answers alone"


def test_a_temperature_softens_and_rescales() -> None:
    student, teacher = logits(0), logits(1)
    found = distillation_loss(student, teacher, LABELS, temperature=2.0)
    torch.testing.assert_close(found, 4 * distillation_loss(student / 2, teacher / 2, LABELS))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.zeros(2, 4, 6)}, r"got \(2, 4, 5\), \(2, 4, 6\), \(2, 4\)"),
        ({"labels": LABELS[:, 1:]}, r"labels \[B, T\], got"),
        ({"temperature": 0.0}, "temperature=0.0; expected a number greater than 0"),
    ],
)
def test_distillation_of_what_does_not_fit(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"student": logits(0), "teacher": logits(1), "labels": LABELS}
    with pytest.raises(ValueError, match=message):
        distillation_loss(**given | change)


def test_prompts_end_before_the_first_label() -> None:
    assert before_labels(LABELS).tolist() == [1, 0]
    assert before_labels(torch.full((1, 3), -100)).tolist() == [2], "a row without labels is all prompt"
    assert before_labels(torch.tensor([[7, 8]])).tolist() == [0]


def test_the_cheapest_that_is_as_good() -> None:
    assert cheapest(torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 0], [0, 2, 1], [1, 1, 2]])).tolist() == [0, 1, 0, 1, 2]


class Words:
    """A tokenizer of words."""

    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [{"</s>": 1, "<end>": 2}.get(word, 10 + len(word)) for word in text.split()]}


class Processor:
    tokenizer = Words()
    chat_template: str | None = None

    def apply_chat_template(self, chat: list[Any], tokenize: bool, add_generation_prompt: bool = False) -> str:
        assert not tokenize
        texts = [p.get("text", "<image>") for m in chat for p in m["content"]]
        return " user ".join(texts[:2]) + " bot " + " ".join([*texts[2:], "<end> \n"][: 2 * (len(chat) > 1)])


def sample(answer: str) -> Sample:
    return Sample(0, "what is it", None, (b"",), (answer, "another"))


def test_an_answer_stands_behind_the_prompt_and_ends() -> None:
    processor = Processor()
    assert answer_tokens(processor, sample("a cat"), {1, 2}) == [11, 13, 1]
    assert answer_tokens(processor, sample("a cat"), {2}) == [11, 13, 2], "the model's end, if the tokenizer's is none"
    processor.chat_template = "yes"
    assert answer_tokens(processor, sample("a cat"), {1, 2}) == [11, 13, 2], "a template ends it"
