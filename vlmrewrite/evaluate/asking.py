"""Questions as a model takes them, a batch of prompts or chats about images padded on the left; and their answers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from vlmrewrite.evaluate.sample import Sample


def encode(processor: Any, samples: Sequence[Sample]) -> Any:
    """Samples as one batch of model inputs, through the chat template if the processor has one.

    Without a template, image tokens that a prompt lacks are put in front of it.

    Raises:
        ValueError: a prompt holds image tokens for another number of images, or it cannot be known what they are.
        OSError: an image cannot be read.
    """
    pictures = [sample.pictures() for sample in samples]
    if getattr(processor, "chat_template", None):
        return processor.apply_chat_template(
            [_chat(sample, iter(images)) for sample, images in zip(samples, pictures, strict=True)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
    texts = [_text(processor, sample) for sample in samples]
    return processor(images=pictures, text=texts, return_tensors="pt", padding=True, padding_side="left")


def groups_of(processor: Any, samples: Sequence[Sample]) -> tuple[list[tuple[Sequence[Sample], Any]], dict[Any, str]]:
    """Samples with their inputs: all in one batch, but for those that cannot be made inputs, and why, by their ids."""
    try:
        return [(samples, encode(processor, samples))], {}
    except Exception as e:
        if len(samples) == 1:
            return [], {samples[0].id: said(e)}
    good, errors = list[Sample](), dict[Any, str]()
    alone = [groups_of(processor, [sample]) for sample in samples]
    for groups, why in alone:
        good += [sample for some, _ in groups for sample in some]
        errors |= why
    if not errors:  # each can be asked, but not all together
        return [group for groups, _ in alone for group in groups], {}
    return (groups_of(processor, good)[0] if good else []), errors


def said(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def answer_tokens(processor: Any, sample: Sample, ends: Collection[int]) -> list[int]:
    """The first of a sample's answers as the model is to give it behind the prompt of :func:`encode`, with its end.

    A chat template says what stands around an answer, and ends it. Without one, it stands behind a space.

    Args:
        processor: the model's.
        sample: with an answer.
        ends: tokens that end a text.
    """
    answer, tokenizer = sample.answers[0], processor.tokenizer
    if getattr(processor, "chat_template", None):
        chat = _chat(sample, iter([None] * len(sample.images)))
        reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
        asked = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        whole = processor.apply_chat_template([*chat, reply], tokenize=False)
        text = whole.removeprefix(asked) if whole.startswith(asked) else answer
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    else:
        asked, whole = (
            list(tokenizer(text, add_special_tokens=False)["input_ids"])
            for text in (sample.prompt, f"{sample.prompt} {answer}")
        )
        known = whole[: len(asked)] == asked
        ids = whole[len(asked) :] if known else list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    stop = next((i for i, token in enumerate(ids) if token in ends), None)
    own = tokenizer.eos_token_id
    return [*ids, own if own in ends else min(ends)] if stop is None else ids[: stop + 1]


def refuse_chats(processor: Any, samples: Sequence[Sample]) -> None:
    """Raise ValueError if samples are chats and the processor has no template for them."""
    if any(sample.messages for sample in samples) and not getattr(processor, "chat_template", None):
        raise ValueError(f"{type(processor).__name__} has no chat template: expected 'prompt' in place of 'messages'")


def with_image_tokens(processor: Any, prompt: str, images: int, where: str = "") -> str:
    """A prompt with an image token for each image; if it has none, they are put in front.

    Raises:
        ValueError: it has some, but of another number, or the processor does not say what they are; ``where`` is put
            in front of the message.
    """
    token = getattr(processor, "image_token", None)
    if not isinstance(token, str):
        raise ValueError(f"{type(processor).__name__} has neither a chat template nor an image_token")
    found = prompt.count(token)
    if found not in (0, images):
        raise ValueError(f"{where}expected {images} times {token!r}, or none, got {found}")
    return prompt if found else " ".join([*[token] * images, prompt])


def _text(processor: Any, sample: Sample) -> str:
    assert sample.prompt is not None, "chats were refused before"
    return with_image_tokens(processor, sample.prompt, len(sample.images), "prompt: ")


def _chat(sample: Sample, images: Iterator[Any]) -> list[dict[str, Any]]:
    """The messages of a sample with its images in their places."""
    if sample.messages is None:
        parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": sample.prompt}]
        return [{"role": "user", "content": parts}]
    return [
        message
        | {
            "content": [
                part | ({"image": next(images)} if part["type"] == "image" else {}) for part in message["content"]
            ]
        }
        for message in sample.messages
    ]
