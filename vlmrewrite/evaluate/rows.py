"""A row of data, as a file or a data set has it, made a sample; or why it is none."""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from vlmrewrite.errors import shown
from vlmrewrite.evaluate.sample import Picture, Sample, opened


class Json(str):
    """A line of JSON, not read yet."""


def sample_of(row: Any, i: int, folder: Path, references: bool = True) -> Sample:
    """The sample of a row.

    Args:
        row: as a file or a data set has it.
        i: its place, which is its id if it has none.
        folder: that paths of images are relative to.
        references: whether it is read what is right; else the sample has no answers.

    Raises:
        ValueError: it is none.
    """
    if isinstance(row, Json):
        try:
            row = json.loads(row)
        except ValueError as e:
            raise ValueError(f"expected JSON: {e}") from None
    if not isinstance(row, Mapping):
        raise ValueError(f"expected a mapping with image, prompt and answer, got {shown(row)}")
    row = {key: value for key, value in row.items() if value is not None}
    _one(row, "image", "images")
    _one(row, "prompt", "messages")
    if "prompt" not in row and "messages" not in row:
        raise ValueError("expected 'prompt' or 'messages', got neither")
    images = row.get("images", [row["image"]] if "image" in row else [])
    if not isinstance(images, Sequence) or isinstance(images, str | bytes):
        raise ValueError(f"images: expected a list, got {shown(images)}")
    prompt, messages = row.get("prompt"), None
    if "messages" in row:
        messages, images = _messages(row["messages"], list(images))
    elif not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"prompt: expected a question, got {shown(prompt)}")
    if not images:
        if "video" in row or "videos" in row:
            raise ValueError("expected an 'image' or 'images', got videos, which are not read: give frames as 'images'")
        raise ValueError("expected an 'image' or 'images', got none: vision tokens are what this is about")
    name = row.get("id", i)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise ValueError(f"id: expected text or an integer, got {shown(name)}")
    kind = row.get("kind")
    answers, choices = _references(row) if references else ((), ())
    pictures = tuple(_picture(image, folder) for image in images)
    return Sample(name, prompt, messages, pictures, answers, choices, None if kind is None else str(kind))


def id_of(row: Any) -> str | int | None:
    """The id of a row that may be no sample, if it has one and that can be read; else None."""
    if isinstance(row, Json):
        try:
            row = json.loads(row)
        except ValueError:
            return None
    found = row.get("id") if isinstance(row, Mapping) else None
    return found if isinstance(found, str | int) and not isinstance(found, bool) else None


def _one(row: dict[str, Any], *names: str) -> None:
    if all(name in row for name in names):
        raise ValueError(f"expected {names[0]!r} or {names[1]!r}, got both")


def _references(row: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is right, and the options."""
    _one(row, "answer", "answers")
    given = row.get("answers", [row["answer"]] if "answer" in row else [])
    if not isinstance(given, Sequence) or isinstance(given, str) or ("answers" in row and not given):
        raise ValueError(f"answers: expected a list of at least one reference, got {shown(given)}")
    if "choices" not in row:
        return tuple(_reference(x) for x in given), ()
    choices = row["choices"]
    if not isinstance(choices, Sequence) or isinstance(choices, str) or len(choices) < 2:
        raise ValueError(f"choices: expected a list of at least two options, got {shown(choices)}")
    if not given:
        raise ValueError("expected an 'answer' beside 'choices', got none")
    options = tuple(_reference(x) for x in choices)
    if len({" ".join(x.lower().split()) for x in options}) < len(options):
        raise ValueError(f"choices: expected options that differ but for case and spaces, got {shown(choices)}")
    return tuple(_option(x, options, choices) for x in given), options


def _reference(value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) == 4 and all(isinstance(x, int | float) for x in value):
        return json.dumps(list(value))  # a box
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not number and not (isinstance(value, str) and value.strip()):
        raise ValueError(f"answer: expected a reference (text, a number, or a box of four), got {shown(value)}")
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)  # a table makes 5.0 of 5


def _option(value: Any, options: tuple[str, ...], choices: Sequence[Any]) -> str:
    """The option that an answer means: itself, its letter, or its place from 0 (a number, where they are text)."""
    place = type(value) is int and all(isinstance(x, str) for x in choices)
    if not place and isinstance(value, str | int | float) and _reference(value) in options:
        return _reference(value)
    at = value if place else -1
    if isinstance(value, str) and len(value.strip()) == 1:
        at = ord(value.strip().upper()) - ord("A")
    if 0 <= at < len(options):
        return options[at]
    raise ValueError(f"answer: expected one of the choices {', '.join(map(repr, options))}, got {shown(value)}")


def _messages(given: Any, images: list[Any]) -> tuple[tuple[dict[str, Any], ...], list[Any]]:
    """A chat whose contents are lists of parts, an image part for each image, and the images."""
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(f"messages: expected a list of messages, got {shown(given)}")
    found, told = list[dict[str, Any]](), list[Any]()
    for message in given:
        if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
            raise ValueError(f"messages: expected mappings with 'role' and 'content', got {shown(message)}")
        content = message["content"]
        content = [{"type": "text", "text": content}] if isinstance(content, str) else content
        parts = list[dict[str, Any]]()
        for part in content if isinstance(content, Sequence) else [content]:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                parts.append({"type": "text", "text": part["text"]})
            elif kind in ("image", "image_url"):
                source = next((part[k] for k in ("image", "path", "url", "image_url") if part.get(k) is not None), None)
                told += [] if source is None else [source.get("url", source) if isinstance(source, Mapping) else source]
                parts.append({"type": "image"})
            else:
                raise ValueError(f"messages: expected parts of the type 'text' or 'image', got {shown(part)}")
        found.append({"role": str(message["role"]), "content": parts})
    places = sum(part["type"] == "image" for m in found for part in m["content"])
    if told and (images or len(told) != places):
        raise ValueError("messages: expected images in all image parts, or in 'image' or 'images' alone")
    images = told or images
    if not places:
        asked = next((m for m in found if m["role"] == "user"), found[0])
        asked["content"] = [{"type": "image"}] * len(images) + asked["content"]
    elif places != len(images):
        raise ValueError(f"messages: expected an image part for each of {len(images)} images, or none, got {places}")
    if not any(part["type"] == "text" and part["text"].strip() for m in found for part in m["content"]):
        raise ValueError("messages: expected a question, got no text")
    return tuple(found), images


def _picture(image: Any, folder: Path) -> Picture:
    """An image that can be opened: where it is, or what it is.

    Raises:
        ValueError: it cannot.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and not image.strip():
        raise ValueError("image: expected a path, got an empty text")
    if isinstance(image, str) and image.startswith("data:"):
        url = image
        try:
            image = base64.b64decode("".join(url.partition(",")[2].split()), validate=True)
        except binascii.Error as e:
            raise ValueError(f"image: expected a data: URL in base64, got {shown(url)}: {e}") from None
    elif isinstance(image, str) and image.startswith("file:"):
        image = Path(url2pathname(urlsplit(image).path))
    elif isinstance(image, str) and image.startswith(("http:", "https:")):
        raise ValueError(f"image: expected one on disk, got {image!r}: download it, and name the file")
    elif isinstance(image, str | os.PathLike):
        image = folder / image
    elif not isinstance(image, bytes):
        if callable(getattr(image, "convert", None)):
            return image
        raise ValueError(f"image: expected a path, bytes or a PIL image, got {shown(image)}")
    from PIL import UnidentifiedImageError  # only what reads images needs it

    try:
        with opened(image) as file:
            file.verify()
    except Exception as e:  # OSError, SyntaxError, and Pillow's own of pictures that are too large
        name = f"{len(image)} bytes" if isinstance(image, bytes) else str(image)
        why = "of no format that Pillow knows" if isinstance(e, UnidentifiedImageError) else e
        raise ValueError(f"image: expected an image file, got {name}: {getattr(e, 'strerror', None) or why}") from None
    return image
