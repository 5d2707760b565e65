"""The language of the digit scenes: the vocabulary, and questions with one-word answers.

Every question has exactly four words, the asked-for thing last where there is one ("color of digit 3"), so that all
prompts of a batch have one length and a question can be packed into a fixed slot during training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 60, 60),
    "green": (60, 200, 70),
    "blue": (80, 110, 250),
    "yellow": (235, 215, 60),
    "purple": (200, 80, 220),
    "white": (240, 240, 240),
}
COLOR_NAMES = list(COLORS)
CELLS = ["top-left", "top", "top-right", "left", "centre", "right", "bottom-left", "bottom", "bottom-right"]
DIGITS = [str(i) for i in range(10)]
EXTREMES = ["leftmost", "rightmost", "highest", "lowest"]
MAX_TOTAL = 27  # "total" is asked of at most three digits

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
ASKING = ["how", "many", "digits", "?", "is", "there", "color", "of", "digit", "which", "at", "cell", "value"]
COMPARING = [*EXTREMES, "largest", "smallest", "maximum", "minimum", "total"]
ANSWERS = ["yes", "no", "none", *COLOR_NAMES, *CELLS, *(str(i) for i in range(MAX_TOTAL + 1))]
VOCABULARY = {word: index for index, word in enumerate([*SPECIAL, *ASKING, *COMPARING, *ANSWERS])}
PAD, BOS, EOS, UNK, IMAGE = range(5)
QUESTION_WORDS = 4

# kind of question -> its share of the mix, before the kinds that a scene cannot answer are left out
SHARES = {
    "count": 1.0,
    "has digit": 2.0,
    "has color": 1.0,
    "color of": 1.5,
    "digit of color": 1.5,
    "digit at": 2.5,
    "cell of": 1.5,
    "extreme": 2.0,
    "size": 2.0,
    "value": 1.5,
    "total": 1.5,
}
KINDS = list(SHARES)


class Digit(NamedTuple):
    """One scan in a scene: what it shows and where. Lengths are pixels; ``top``/``left`` is its upper left corner."""

    value: int
    cell: int
    color: int
    size: int
    top: int
    left: int
    side: int


class Question(NamedTuple):
    """A question of four words, its one-word answer, and its kind (a key of ``SHARES``)."""

    kind: str
    text: str
    answer: str


T = TypeVar("T")


def _pick(rng: np.random.Generator, items: list[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _extremes(digits: list[Digit]) -> dict[str, Digit]:
    """Extreme words that have a clear answer: the runner-up's centre is at least six pixels behind."""
    along: dict[str, Callable[[Digit], float]] = {
        "leftmost": lambda d: d.left + d.side / 2,
        "rightmost": lambda d: -d.left - d.side / 2,
        "highest": lambda d: d.top + d.side / 2,
        "lowest": lambda d: -d.top - d.side / 2,
    }
    clear = {}
    for word, key in along.items():
        order = sorted(digits, key=key)
        if len(order) > 1 and key(order[1]) - key(order[0]) >= 6:
            clear[word] = order[0]
    return clear


def ask(digits: list[Digit], n: int, rng: np.random.Generator) -> list[Question]:
    """Draw ``n`` questions about one scene (with replacement); every one has exactly one right answer."""
    values = [d.value for d in digits]
    single = [d for d in digits if values.count(d.value) == 1]
    clear = _extremes(digits)
    possible = {
        "color of": bool(single),
        "cell of": bool(single),
        "extreme": bool(clear),
        "size": len(digits) > 1,
        "value": len(digits) > 1,
        "total": len(digits) <= 3,
    }
    kinds = [kind for kind in KINDS if possible.get(kind, True)]
    shares = np.array([SHARES[kind] for kind in kinds])
    drawn = rng.choice(len(kinds), n, p=shares / shares.sum())
    return [_ask_one(kinds[int(i)], digits, single, clear, rng) for i in drawn]


def _ask_one(
    kind: str, digits: list[Digit], single: list[Digit], clear: dict[str, Digit], rng: np.random.Generator
) -> Question:
    values = [d.value for d in digits]
    one = _pick(rng, digits)
    coin = bool(rng.random() < 0.5)
    if kind == "count":
        text, answer = "how many digits ?", str(len(digits))
    elif kind == "has digit":
        absent = [v for v in range(10) if v not in values]
        text, answer = f"is there digit {one.value if coin else _pick(rng, absent)}", "yes" if coin else "no"
    elif kind == "has color":
        missing = [c for c in range(len(COLORS)) if c not in [d.color for d in digits]]
        word = COLOR_NAMES[one.color if coin else _pick(rng, missing)]
        text, answer = f"is there color {word}", "yes" if coin else "no"
    elif kind == "color of":
        one = _pick(rng, single)
        text, answer = f"color of digit {one.value}", COLOR_NAMES[one.color]
    elif kind == "digit of color":
        text, answer = f"digit of color {COLOR_NAMES[one.color]}", str(one.value)
    elif kind == "digit at":
        cell, answer = one.cell, str(one.value)
        if rng.random() < 0.2:
            cell, answer = _pick(rng, [c for c in range(len(CELLS)) if c not in [d.cell for d in digits]]), "none"
        text = f"digit at cell {CELLS[cell]}"
    elif kind == "cell of":
        one = _pick(rng, single)
        text, answer = f"cell of digit {one.value}", CELLS[one.cell]
    elif kind == "extreme":
        word = _pick(rng, list(clear))
        text, answer = f"which digit is {word}", str(clear[word].value)
    elif kind == "size":
        best = (max if coin else min)(digits, key=lambda d: d.size)
        text, answer = f"which digit is {'largest' if coin else 'smallest'}", str(best.value)
    elif kind == "value":
        text, answer = f"which value is {'maximum' if coin else 'minimum'}", str((max if coin else min)(values))
    elif kind == "total":
        text, answer = "which value is total", str(sum(values))
    else:
        raise ValueError(f"unknown kind of question {kind!r}, expected one of {KINDS}")
    return Question(kind, text, answer)
