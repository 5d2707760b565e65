"""The two tasks of the study: a model, questions to learn from, and held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import model as digits_model
from .. import questions as digits_questions
from .. import scenes
from ..documents import fonts, pages
from ..documents import model as documents_model
from ..documents import questions as documents_questions

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: ``"digits"`` or ``"documents"``.
        load: gives model and processor.
        held_out: ``n`` questions that judge, with a seed.
        learn: ``n`` questions that blocks learn from, with a seed, several about each picture.
        kinds: of questions.
        seed: of the questions that judge.
        about: in words.
    """

    name: str
    load: Callable[[], tuple[Any, Any]]
    held_out: Callable[[int, int], Rows]
    learn: Callable[[int, int], Rows]
    kinds: tuple[str, ...]
    seed: int
    about: str


def _row(image: Any, prompt: str, answer: str, kind: str) -> dict[str, Any]:
    return {"image": image, "prompt": prompt, "answer": answer, "kind": kind}


def _digits() -> Task:
    from ..blocks import rows

    def held_out(n: int, seed: int) -> Rows:
        return [_row(x.image, x.question, x.answer, x.kind) for x in scenes.held_out_questions(n, seed)]

    def load() -> tuple[Any, Any]:
        model, processor = digits_model.load()
        any_size(model.model.vision_tower)
        return model, processor

    return Task(
        "digits",
        load,
        held_out,
        rows,
        tuple(digits_questions.KINDS),
        50,
        "scenes of one to five scanned digits, 144 vision tokens, 8 decoder layers",
    )


def any_size(tower: Any) -> None:
    """Let a tower interpolate its positions, so that it takes smaller pictures; at its own size nothing changes.

    Swin's layers would make their windows smaller for small pictures, and keep them so; here these are padded.
    """
    embed = tower.embeddings.forward
    for layer in (m for m in tower.modules() if hasattr(m, "set_shift_and_window_size")):
        layer.set_shift_and_window_size = lambda _: None

    def forward(pixel_values: torch.Tensor, **_: Any) -> Any:
        return embed(pixel_values, interpolate_pos_encoding=True)

    tower.embeddings.forward = forward


def _documents(faces: Sequence[str], checkpoint: Path) -> Task:
    def held_out(n: int, seed: int) -> Rows:
        return [_row(x.image, x.question, x.answer, x.kind) for x in pages.held_out_questions(n, seed, 1, faces)]

    def learn(n: int, seed: int) -> Rows:
        return [_row(x.image, x.question, x.answer, x.kind) for x in pages.learnt_questions(n, seed, 4, faces)]

    def load() -> tuple[Any, Any]:
        model, processor = documents_model.load(checkpoint)
        any_size(model.model.vision_tower)
        return model, processor

    return Task(
        "documents",
        load,
        held_out,
        learn,
        tuple(documents_questions.KINDS),
        60,
        "pages of three to six lines of prose, 576 vision tokens, 6 decoder layers",
    )


def task_of(
    name: str, faces: Sequence[str] = tuple(fonts.FACES), checkpoint: Path = documents_model.CHECKPOINT
) -> Task:
    """A task by its name; pages are printed in ``faces``, and read by the model in ``checkpoint``.

    Both towers are asked to interpolate their positions, so that they take smaller pictures, though none were in their
    training.

    Raises:
        ValueError: there is none of that name.
        FileNotFoundError: a face is not on this machine, or there is no model of the documents.
    """
    if name == "digits":
        return _digits()
    if name == "documents":
        for one in faces:
            fonts.face(one)
        if not (checkpoint / "config.json").is_file():
            raise FileNotFoundError(
                f"{checkpoint}: no model of the documents: python -m examples.digits.documents.train makes one in some"
                " hours; or take --task digits"
            )
        return _documents(faces, checkpoint)
    raise ValueError(f"expected the task 'digits' or 'documents', got {name!r}")


@contextmanager
def encoded_once(model: Any) -> Iterator[None]:
    """Inside, the tower encodes the same pictures once where recipes are asked about them in turn."""
    tower = model.model.vision_tower
    known = dict[tuple[int, ...], tuple[torch.Tensor, Any]]()

    def forward(pixel_values: torch.Tensor, **options: Any) -> Any:
        size = tuple(pixel_values.shape)
        if size not in known or not torch.equal(known[size][0], pixel_values):
            known[size] = pixel_values, type(tower).forward(tower, pixel_values, **options)
        made = known[size][1]
        return type(made)(**dict(made.items()))  # what is put into one is not in the others

    tower.forward = forward
    try:
        yield
    finally:
        del tower.forward
