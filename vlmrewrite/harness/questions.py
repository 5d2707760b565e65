"""What lmms-eval asks, as samples: a text with pictures, or a chat."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmrewrite.errors import shown
from vlmrewrite.evaluate import Sample

IMAGE = "<image>"
"""How tasks of lmms-eval write where in a text a picture stands."""


def of_prompt(processor: Any, number: int, text: str, visuals: Sequence[Any]) -> Sample:
    """The sample of a text and its pictures, which stand in front of it unless it says where.

    Args:
        processor: the model's.
        number: of the request, which becomes the sample's id.
        text: may hold as many times ``<image>`` as there are pictures.
        visuals: what ``doc_to_visual`` of a task gives.

    Raises:
        ValueError: among the visuals is something else than pictures.
    """
    images = tuple(_picture(x, number) for x in visuals)
    between = text.split(IMAGE)
    if len(between) - 1 != len(images) or not images:
        between = [*[""] * len(images), text]
    parts: list[dict[str, Any]] = []
    for i, piece in enumerate(between):
        parts += [{"type": "image"}] * bool(i)
        parts += [{"type": "text", "text": piece.strip()}] * bool(piece.strip())
    return _sample(processor, number, [{"role": "user", "content": parts}], images)


def of_chat(processor: Any, number: int, messages: Sequence[Mapping[str, Any]]) -> Sample:
    """The sample of a chat, as ``doc_to_messages`` of a task gives it.

    Args:
        processor: the model's.
        number: of the request, which becomes the sample's id.
        messages: parts are texts (``text``) and pictures (``url``).

    Raises:
        ValueError: a part is something else; or the processor has no chat template, and this is more than a question.
    """
    images, chat = [], []
    for message in messages:
        content, parts = message["content"], []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if part["type"] == "text":
                parts.append({"type": "text", "text": part["text"]})
                continue
            images.append(_picture(part.get("url") if part["type"] == "image" else part, number))
            parts.append({"type": "image"})
        chat.append({"role": message["role"], "content": parts})
    return _sample(processor, number, chat, tuple(images))


def _sample(processor: Any, number: int, chat: list[dict[str, Any]], images: tuple[Any, ...]) -> Sample:
    if getattr(processor, "chat_template", None):
        return Sample(number, None, tuple(chat), images)
    if [message["role"] for message in chat] != ["user"]:
        raise ValueError(
            f"request {number}: {type(processor).__name__} has no chat template: expected one question, got messages of"
            f" {', '.join(message['role'] for message in chat)}"
        )
    token = getattr(processor, "image_token", IMAGE)
    prompt = " ".join(part["text"] if part["type"] == "text" else token for part in chat[0]["content"])
    return Sample(number, prompt, None, images)


def _picture(given: Any, number: int) -> Any:
    """A picture as samples have it."""
    if isinstance(given, str | os.PathLike):
        path = Path(given)
        if path.suffix.lower() in _SUFFIXES:
            return path
    elif isinstance(given, bytes) or hasattr(given, "convert"):
        return given
    raise ValueError(
        f"request {number}: expected pictures, got {shown(given)}: base=... in --model_args names a model of lmms-eval"
        " that reads it"
    )


_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
