"""What lmms-eval is given, without it: requests as samples, settings, and losses of continuations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlmrewrite as vr
from examples.digits.model import CHECKPOINT
from examples.digits.scenes import held_out_questions
from vlmrewrite.evaluate import Sample
from vlmrewrite.harness.answering import Answering
from vlmrewrite.harness.questions import of_chat, of_prompt
from vlmrewrite.harness.settings import LONGEST, settings_of

PICTURE = Image.new("RGB", (2, 2))


class Chatting:
    """A processor with a chat template."""

    chat_template = "a template"


class Plain:
    """One without."""

    image_token = "<picture>"


def texts(sample: Sample) -> list[str]:
    [message] = sample.messages or ()
    return [part["type"] if part["type"] == "image" else part["text"] for part in message["content"]]


@pytest.mark.parametrize(
    ("text", "pictures", "expected"),
    [
        ("what?", 2, ["image", "image", "what?"]),
        ("of <image> and <image>?", 2, ["of", "image", "and", "image", "?"]),
        ("<image>what?", 1, ["image", "what?"]),
        ("what is <image>?", 2, ["image", "image", "what is <image>?"]),
        ("what is <image>?", 0, ["what is <image>?"]),
    ],
)
def test_pictures_stand_where_a_text_says(text: str, pictures: int, expected: list[str]) -> None:
    sample = of_prompt(Chatting(), 3, text, [PICTURE] * pictures)
    assert texts(sample) == expected and len(sample.images) == pictures and sample.id == 3
    alone = of_prompt(Plain(), 3, text, [PICTURE] * pictures)
    assert alone.messages is None
    assert alone.prompt == " ".join("<picture>" if word == "image" else word for word in expected)


def test_chats_keep_their_turns() -> None:
    chat: list[dict[str, Any]] = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image", "url": "a/b.PNG"}]},
    ]
    sample = of_chat(Chatting(), 0, chat)
    assert sample.images == (Path("a/b.PNG"),)
    assert [m["role"] for m in sample.messages or ()] == ["system", "user"]
    assert of_chat(Plain(), 0, chat[1:]).prompt == "what? <picture>"
    with pytest.raises(ValueError, match="^request 7: Plain has no chat template: .*, got messages of system, user$"):
        of_chat(Plain(), 7, chat)


@pytest.mark.parametrize("visual", ["talk.mp4", {"array": [0.0]}, 3])
def test_what_is_no_picture(visual: Any) -> None:
    with pytest.raises(ValueError, match="^request 2: expected pictures, got .*: base=... in --model_args"):
        of_prompt(Chatting(), 2, "what?", [visual])


def test_a_video_in_a_chat_is_no_picture() -> None:
    chat = [{"role": "user", "content": [{"type": "video", "url": "talk.mp4"}]}]
    with pytest.raises(ValueError, match="^request 2: expected pictures, got .*'video'.*: base="):
        of_chat(Chatting(), 2, chat)


@pytest.mark.parametrize(
    ("given", "sampled"),
    [
        ({}, False),
        ({"do_sample": True}, False),
        ({"temperature": 0, "do_sample": True, "top_p": 0.9}, False),
        ({"temperature": 0.7}, True),
        ({"temperature": 0.7, "do_sample": False}, False),
        ({"temperature": None, "top_p": None, "num_beams": None}, False),
    ],
)
def test_answers_are_greedy_without_a_temperature(given: dict[str, Any], sampled: bool) -> None:
    arguments = settings_of(given).arguments
    assert arguments["do_sample"] is sampled
    assert arguments["temperature"] == (0.7 if sampled else None)
    assert arguments["top_p"] is None
    assert arguments["max_new_tokens"] == LONGEST


def test_settings_that_end_an_answer_or_play_no_part() -> None:
    settings = settings_of(
        {"until": ["\n\n", ""], "stop_sequences": "END", "num_beams": 2, "image_aspect_ratio": "pad"}
    )
    assert settings.cut(" one END two\n\nthree") == "one"
    assert settings.cut("one\n\nthree END") == "one"
    assert settings.others == ("image_aspect_ratio",)
    assert settings.arguments["num_beams"] == 2
    with pytest.raises(ValueError, match=r"^until: expected a text, or a list of texts, got \[3\]"):
        settings_of({"until": [3]})


def test_arguments_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^unknown dtype 'float23', expected one of .*did you mean 'float32'"):
        Answering(str(CHECKPOINT), None, torch.device("cpu"), dtype="float23")
    (tmp_path / "vlmrewrite.json").touch()
    with pytest.raises(ValueError, match="holds a recipe: expected recipe="):
        Answering(str(tmp_path), None, torch.device("cpu"))


@pytest.mark.slow
@torch.no_grad()
def test_losses_are_those_of_steps_that_are_forced() -> None:
    """Of each continuation, in a batch, what `generate()` gives its tokens where it must take them."""
    asks = Answering(str(CHECKPOINT), "sts-half", torch.device("cpu"), backend="eager")
    samples = [
        of_prompt(asks.processor, i, asked.question, [asked.image]) for i, asked in enumerate(held_out_questions(3))
    ]
    [(said, _)] = asks.answers(samples[:1], settings_of({"max_new_tokens": 4}))
    words = [said, "7", "top-left"]
    answered = [Sample(s.id, s.prompt, None, s.images, (word,)) for s, word in zip(samples, words, strict=True)]
    tokenizer = asks.processor.tokenizer
    losses = asks.losses(answered)
    assert losses[0][1] and not losses[2][1]
    for sample, word, (loss, greedy) in zip(samples, words, losses, strict=True):
        forced = [tokenizer.convert_tokens_to_ids(word), tokenizer.eos_token_id]
        inputs = asks._encode([sample])
        start = inputs["input_ids"].shape[1]
        out = asks.model.generate(
            **inputs,
            max_new_tokens=2,
            do_sample=False,
            prefix_allowed_tokens_fn=lambda _, ids, forced=forced, start=start: [forced[len(ids) - start]],
            output_logits=True,
            return_dict_in_generate=True,
        )
        logs = torch.cat(out.logits).log_softmax(-1)
        torch.testing.assert_close(torch.tensor(loss), -logs[[0, 1], forced].mean(), atol=1e-4, rtol=0)
        assert greedy is (logs.argmax(-1).tolist() == forced)


@pytest.mark.slow
def test_answers_end_with_the_text_and_texts_alone_are_asked() -> None:
    asks = Answering(str(CHECKPOINT), "stride-half", torch.device("cpu"), backend="eager")
    asked = held_out_questions(2)
    pictured = [of_prompt(asks.processor, i, a.question, [a.image]) for i, a in enumerate(asked)]
    found = asks.answers(pictured, settings_of({"max_new_tokens": 4}))
    assert [n for _, n in found] == [2, 2]  # a word and the end
    assert "stride" in str(vr.report(asks.model))
    assert len(asks.answers([of_prompt(asks.processor, 0, asked[0].question, [])], settings_of({}))) == 1
