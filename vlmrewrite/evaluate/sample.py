"""A sample: what a model is asked about pictures, and what is right."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Picture = Any
"""A path, the bytes of a file, or a PIL image."""


@dataclass(frozen=True)
class Sample:
    """One question about images.

    Attributes:
        id: of the sample, unlike every other one's: as the data has it, else its place, from 0.
        prompt: the question, or None.
        messages: the chat in place of it, or None; parts ``{"type": "image"}`` stand for the images, in order.
        images: paths, bytes of image files, or PIL images.
        answers: what is right; none if it is not known.
        choices: options, of which the answer is one.
        kind: of question, or None.
    """

    id: str | int
    prompt: str | None
    messages: tuple[dict[str, Any], ...] | None
    images: tuple[Picture, ...]
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    kind: str | None = None

    def pictures(self) -> list[Any]:
        """The images, PIL in RGB.

        Raises:
            OSError: a file cannot be read, or is no whole image.
        """
        found = []
        for image in self.images:
            with opened(image) as file:
                found.append(file.convert("RGB"))
        return found

    def question(self) -> str:
        """What is asked, as one text."""
        if self.prompt is not None:
            return self.prompt
        parts = [part for m in self.messages or () for part in m["content"] if part["type"] == "text"]
        return "\n".join(part["text"] for part in parts)


@contextlib.contextmanager
def opened(image: Picture) -> Iterator[Any]:
    """A PIL image; its file, if it was not given opened, is closed behind the block."""
    from PIL import Image  # only what reads images needs it

    if not isinstance(image, Path | bytes):
        yield image
        return
    with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as file:
        yield file
