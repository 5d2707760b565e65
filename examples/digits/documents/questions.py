"""The language of the pages: real prose, the words that are asked for, and questions about a page.

The prose is that of Python's own documentation (``pydoc_data.topics``, part of every Python); a quarter of its topics
is held out. Questions have four words that are capitalised, but for words of the page, or digits; answers are a word of
the page, yes or no, a side, or a number that is spelled digit by digit.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np

WORDS = (
    """
    the is of to in and for if are be an that as or class with it by not object this value function method can
    statement when exception return from used string name instance attribute objects on will module other list
    same which type called sequence also all code see may one should arguments expression at defined only argument
    types dictionary new any values its python methods version must using true pattern have clause no names note
    but set number they following suite except block none namespace first there such executed has then example
    call operations these default false functions syntax case classes definition special given characters raised
    assignment attributes tuple result section context global changed items than try more support character raise
    current target each does line keyword execution base import implementation otherwise was returns implement
    variables two use expressions created keys empty within key comparison operation standard instances local
    sequences order raises most finally numbers their variable strings mapping where point parameter form
    reference evaluated integer item mutable bound you returned statements either like found literals so always
    length def equivalent before some positional define single patterns those after operator else descriptor
    numeric typeerror interpreter present containing access
    """
).split()
"""The most frequent words of two letters or more in the documentation of Python 3.11."""

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<image>"]
PAD, BOS, EOS, UNK, IMAGE = range(5)
DIGITS = [str(i) for i in range(10)]
SIDES = ["Left", "Centre", "Right"]
ASKING = "How Many Lines ? Times Of Is There Word Line Side After Before First Last Number In Red".split()
VOCABULARY = {word: i for i, word in enumerate([*SPECIAL, *DIGITS, *SIDES, "Yes", "No", *ASKING, *WORDS])}
QUESTION_WORDS, ANSWER_TOKENS = 4, 2
MOST_LINES = 6

# kind of question -> its share of the mix, before the kinds that a page cannot answer are left out
SHARES = {
    "lines": 0.7,
    "times": 1.0,
    "there": 1.5,
    "line of": 1.5,
    "side of": 1.0,
    "after": 1.5,
    "before": 1.5,
    "first": 1.5,
    "last": 1.5,
    "number": 1.5,
    "red": 1.0,
}
KINDS = list(SHARES)
T = TypeVar("T")


class Token(NamedTuple):
    """A word on a page: as it is printed, what it is to the questions, and where (pixels).

    ``word`` is its place in ``WORDS``, or -1; ``number`` is a number of two digits, or -1; ``red``: printed in red.
    """

    text: str
    word: int
    number: int
    line: int
    left: float
    right: float
    red: bool


class Question(NamedTuple):
    """A question of four words, its answer (one or two tokens, a blank between), and its kind."""

    kind: str
    text: str
    answer: str


_PLAIN = re.compile(r"[(\"'`]?([A-Za-z]+)[.,;:)\"'`]*")
_PLACES = {word: i for i, word in enumerate(WORDS)}


@cache
def prose(held_out: bool) -> list[tuple[str, int]]:
    """Words in their order, as printed, each with its place in ``WORDS`` or -1; of the held-out topics, or the others.

    What is not a word with its punctuation (code, symbols) is left out. Topics quote one another: paragraphs of
    held-out topics that stand in another one too are left out.
    """
    from pydoc_data.topics import topics

    parts: dict[bool, dict[str, None]] = {True: {}, False: {}}
    for name in sorted(topics):
        chosen = parts[zlib.crc32(name.encode()) % 4 == 0]
        chosen.update(dict.fromkeys(" ".join(part.split()) for part in topics[name].split("\n\n")))
    found = []
    for part in parts[held_out]:
        if not (held_out and part in parts[False]):
            for piece in part.split():
                if match := _PLAIN.fullmatch(piece):
                    found.append((piece, _PLACES.get(match[1].lower(), -1)))
    return found


def ask(tokens: list[Token], width: float, n: int, rng: np.random.Generator) -> list[Question]:
    """Draw ``n`` questions about one page (with replacement); every one has exactly one right answer.

    Args:
        tokens: the page's, line by line.
        width: of the page, in pixels.
        n: how many.
        rng: draws.
    """
    lines: list[list[Token]] = []
    for token in tokens:
        if token.line == len(lines):
            lines.append([])
        lines[token.line].append(token)
    counts: dict[int, int] = {}
    for token in tokens:
        if token.word >= 0:
            counts[token.word] = counts.get(token.word, 0) + 1
    single = [t for t in tokens if t.word >= 0 and counts[t.word] == 1]
    pairs = [(a, b) for line in lines for a, b in pairwise(line) if a.word >= 0 and b.word >= 0]
    numbers = [[t for t in line if t.number >= 0] for line in lines]
    by_count: dict[int, list[int]] = {}
    for word, count in counts.items():
        by_count.setdefault(min(count, 6), []).append(word)
    by_count.pop(6, None)
    absent = [i for i in range(len(WORDS)) if i not in counts]
    choices: dict[str, list[tuple[str, str]]] = {
        "lines": [("How Many Lines ?", str(len(lines)))],
        "line of": [(f"Line Of Word {WORDS[t.word]}", str(t.line + 1)) for t in single],
        "side of": [
            (f"Side Of Word {WORDS[t.word]}", SIDES[min(2, int(3 * (t.left + t.right) / 2 / width))]) for t in single
        ],
        "after": [(f"Word After Word {WORDS[a.word]}", WORDS[b.word]) for a, b in pairs if counts[a.word] == 1],
        "before": [(f"Word Before Word {WORDS[b.word]}", WORDS[a.word]) for a, b in pairs if counts[b.word] == 1],
        "first": [(f"First Word Line {i + 1}", WORDS[x[0].word]) for i, x in enumerate(lines) if x[0].word >= 0],
        "last": [(f"Last Word Line {i + 1}", WORDS[x[-1].word]) for i, x in enumerate(lines) if x[-1].word >= 0],
        "number": [
            (f"Number In Line {i + 1}", " ".join(str(x[0].number))) for i, x in enumerate(numbers) if len(x) == 1
        ],
        "red": [("Word In Red ?", WORDS[t.word]) for t in tokens if t.red],
    }
    usable = [kind for kind in KINDS if choices.get(kind, [counts])]
    shares = np.array([SHARES[kind] for kind in usable])
    out = []
    for i in rng.choice(len(usable), n, p=shares / shares.sum()):
        kind = usable[int(i)]
        if kind == "there":
            coin = bool(rng.random() < 0.5) and bool(counts)
            word = _pick(rng, sorted(counts) if coin else absent)
            text, answer = f"Is There Word {WORDS[word]}", "Yes" if coin else "No"
        elif kind == "times":
            count = _pick(rng, [0, *sorted(by_count)])
            text, answer = f"Times Of Word {WORDS[_pick(rng, by_count[count] if count else absent)]}", str(count)
        else:
            text, answer = _pick(rng, choices[kind])
        out.append(Question(kind, text, answer))
    return out


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]
