"""Pages of text: layout, rendering, per-patch labels, training batches and held-out questions.

A page is 336x336 RGB: three to six lines, double-spaced, of consecutive prose in one face, with size, spacing, margins,
ink and paper of its own, numbers in place of some words, and one word in red. Everything is a function of the seed, the
faces and the prose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from ..scenes import HeldOut
from .fonts import FACES, face
from .questions import (
    ANSWER_TOKENS,
    EOS,
    KINDS,
    MOST_LINES,
    VOCABULARY,
    WORDS,
    Question,
    Token,
    ask,
    prose,
)

CANVAS, PATCH = 336, 14
GRID = CANVAS // PATCH
VISION_TOKENS = GRID * GRID
SIZES = (19, 24)  # pixels of an em, least and most
EVALUATION_SEED = 40
LINE = 2  # line spacing: a line fills two rows of patches, and the next two rows are empty
NOISE = 5.0  # standard deviation of the pixel noise, in grey levels
MEAN, STD = 0.87, 0.25  # of the pixels, about; paper is near 0 then
RED = (215, 30, 40)
NUMBERS = 0.15  # share of the words in whose place a number stands

Pixels = NDArray[np.uint8]

# per-patch labels, with the number of classes of each; 0 is background everywhere
LABELS = {
    "letter": 28,  # other, a..z
    "word": 2 + len(WORDS),  # other, then the words
    "after": 3 + len(WORDS),  # none, other, then the words
    "before": 3 + len(WORDS),
    "line": 1 + MOST_LINES,
    "edge": 5,  # inside, first, last, alone
    "tens": 12,  # no number, 0..9
    "units": 12,
    "red": 3,  # no, yes
}


class Batch(NamedTuple):
    """Training data for n pages with m questions each."""

    pixels: torch.Tensor  # [n, 3, side, side], standardised
    slots: torch.Tensor  # [n, m, 7] token ids: four question words, the answer, and <eos> behind it
    kinds: torch.Tensor  # [n, m] indices into KINDS
    labels: torch.Tensor  # [n, len(LABELS), patches]


class PageSampler:
    """An endless, seeded source of pages."""

    def __init__(self, held_out: bool, seed: int, faces: Sequence[str] = tuple(FACES)) -> None:
        """``faces`` are names in ``FACES``.

        Raises:
            FileNotFoundError: one is not on this machine.
        """
        self.prose, self.rng = prose(held_out), np.random.default_rng(seed)
        self.faces = [face(name) for name in faces]
        self.noise = self.rng.standard_normal(CANVAS * CANVAS, np.float32) * np.float32(NOISE)
        self.fonts: dict[tuple[int, int], ImageFont.FreeTypeFont] = {}
        self.lines = (3, MOST_LINES)
        self.sizes = SIZES
        self.rows = GRID  # of patches, from the top, that hold text

    def _font(self, which: int, size: int) -> ImageFont.FreeTypeFont:
        key = which, size
        if key not in self.fonts:
            self.fonts[key] = ImageFont.truetype(self.faces[which], size, layout_engine=ImageFont.Layout.BASIC)
        return self.fonts[key]

    def draw(self) -> tuple[Pixels, list[Token], float, NDArray[np.float64]]:
        """One page [336, 336, 3], its tokens, the em in pixels, and where lines begin (their tops, pixels)."""
        rng = self.rng
        n = int(rng.integers(self.lines[0], self.lines[1] + 1))
        size = int(rng.integers(self.sizes[0], self.sizes[1] + 1))
        font = self._font(int(rng.integers(len(self.faces))), size)
        pitch = 2 * LINE * PATCH
        top = 2 * PATCH * int(rng.integers((self.rows - pitch * n // PATCH) // 2 + 1)) + 1
        left, width = rng.uniform(4, 30), rng.uniform(0.75, 1.0)
        right, space = left + (CANVAS - 4 - left) * width, size * rng.uniform(0.25, 0.5)
        at = int(rng.integers(len(self.prose)))
        tokens: list[Token] = []
        for line in range(n):
            x, here = left + (rng.uniform(0, 30) if rng.random() < 0.3 else 0), list[Token]()
            while True:
                text, word = self.prose[at % len(self.prose)]
                number = int(rng.integers(10, 100)) if rng.random() < NUMBERS else -1
                text, word = (str(number), -1) if number >= 0 else (text, word)
                end = x + font.getlength(text)
                if end > right and here:
                    break
                at += 1
                if end > CANVAS - 2:
                    continue
                here.append(Token(text, word, number, line, x, end, False))
                x = end + space
            tokens += here
        known = [i for i, t in enumerate(tokens) if t.word >= 0]
        if known:
            red = known[int(rng.integers(len(known)))]
            tokens[red] = tokens[red]._replace(red=True)
        tops = top + pitch * np.arange(n, dtype=np.float64)
        masks = [Image.new("L", (CANVAS, CANVAS)) for _ in range(2)]
        pens = [ImageDraw.Draw(mask) for mask in masks]
        for token in tokens:
            pens[token.red].text((token.left, tops[token.line]), token.text, fill=255, font=font)
        paper = rng.uniform(205, 250) + rng.uniform(-12, 12, 3)
        ink = rng.uniform(0, 70) + rng.uniform(-15, 15, 3)
        alpha = np.asarray(masks[0], np.float32) * np.float32(1 / 255)
        canvas = alpha[..., None] * (ink - paper).astype(np.float32) + paper.astype(np.float32)
        if box := masks[1].getbbox():
            x0, y0, x1, y1 = box
            area, alpha = canvas[y0:y1, x0:x1], np.asarray(masks[1].crop(box), np.float32)[..., None] / 255
            area += alpha * (np.array(RED, np.float32) - area)
        shift = int(rng.integers(CANVAS * CANVAS))
        canvas += np.roll(self.noise, shift).reshape(CANVAS, CANVAS, 1)
        out: Pixels = np.clip(canvas, 0, 255).astype(np.uint8)
        return out, tokens, float(size), tops

    def labels(self, tokens: list[Token], size: float, tops: NDArray[np.float64], grid: int) -> NDArray[np.int64]:
        """[len(LABELS), grid * grid]: what is under each patch's centre."""
        found = np.zeros((len(LABELS), grid, grid), np.int64)
        step = CANVAS / grid
        centres = (np.arange(grid) + 0.5) * step
        for i, t in enumerate(tokens):
            rows = np.flatnonzero((centres >= tops[t.line] - 0.05 * size) & (centres < tops[t.line] + 1.2 * size))
            columns = np.flatnonzero((centres >= t.left - 0.12 * size) & (centres < t.right + 0.12 * size))
            if not len(rows) or not len(columns):
                continue
            first = i == 0 or tokens[i - 1].line != t.line
            last = i + 1 == len(tokens) or tokens[i + 1].line != t.line
            near = [1 if edge else 2 if x.word < 0 else 3 + x.word
                    for edge, x in ((last, tokens[min(i + 1, len(tokens) - 1)]), (first, tokens[i - 1]))]  # fmt: skip
            letters = ((centres[columns] - t.left) / max(1.0, t.right - t.left) * len(t.text)).astype(int)
            chars = [t.text[max(0, min(len(t.text) - 1, j))].lower() for j in letters]
            number = divmod(t.number, 10) if t.number >= 0 else (-1, -1)
            values = [0, 2 + t.word if t.word >= 0 else 1, *near, t.line + 1, 1 + first + 2 * last,
                      2 + number[0], 2 + number[1], 1 + t.red]  # fmt: skip
            found[:, rows[:, None], columns] = np.array(values)[:, None, None]
            found[0, rows[:, None], columns] = [ord(c) - 95 if "a" <= c <= "z" else 1 for c in chars]
        return found.reshape(len(LABELS), grid * grid)

    def batch(self, n: int, questions: int = 0, grid: int = GRID) -> Batch:
        """``n`` pages of ``grid`` x ``grid`` patches (made smaller for less than 24) with some questions each."""
        pixels = np.empty((n, CANVAS, CANVAS, 3), np.uint8)
        labels = np.empty((n, len(LABELS), grid * grid), np.int64)
        asked: list[Question] = []
        for i in range(n):
            pixels[i], tokens, size, tops = self.draw()
            labels[i] = self.labels(tokens, size, tops, grid)
            asked += ask(tokens, CANVAS, questions, self.rng) if questions else []
        slots = [slot(q) for q in asked]
        made = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255).sub_(MEAN).div_(STD)
        if grid != GRID:
            made = F.interpolate(made, size=grid * PATCH, mode="bilinear", antialias=True)
        return Batch(
            made.contiguous(),
            torch.tensor(slots, dtype=torch.int64).reshape(n, questions, -1) if slots else torch.empty(n, 0, 7).long(),
            torch.tensor([KINDS.index(q.kind) for q in asked], dtype=torch.int64).reshape(n, questions),
            torch.from_numpy(labels),
        )


def slot(question: Question) -> list[int]:
    """Four words, the answer, <eos>; one more <eos> where the answer is one token."""
    answer = [VOCABULARY[w] for w in question.answer.split()]
    return [VOCABULARY[w] for w in question.text.split()] + answer + [EOS] * (ANSWER_TOKENS + 1 - len(answer))


def held_out_questions(
    n: int, seed: int = EVALUATION_SEED, per_page: int = 1, faces: Sequence[str] = tuple(FACES)
) -> list[HeldOut]:
    """``n`` questions about pages of held-out prose, ``per_page`` of them about each page."""
    return _questions(PageSampler(True, seed, faces), n, per_page)


def learnt_questions(n: int, seed: int, per_page: int = 4, faces: Sequence[str] = tuple(FACES)) -> list[HeldOut]:
    """The same about pages of the prose that is learnt from."""
    return _questions(PageSampler(False, seed, faces), n, per_page)


def _questions(sampler: PageSampler, n: int, per_page: int) -> list[HeldOut]:
    records: list[HeldOut] = []
    while len(records) < n:
        pixels, tokens, *_ = sampler.draw()
        image = Image.fromarray(pixels)
        records += [HeldOut(image, *question) for question in ask(tokens, CANVAS, per_page, sampler.rng)]
    return records[:n]
