"""Scenes of scanned digits: the held-out split, rendering, per-patch labels and training batches.

The scans are the 1797 handwritten 8x8 digits of ``sklearn.datasets.load_digits``. A stratified quarter of the scans is
held out and used for evaluation only. A scene is a 96x96 RGB picture with a dark noisy background, strokes and specks,
and one to five enlarged scans in different colours and sizes, one a cell of a 3x3 grid, jittered inside the cell.
Everything is a function of the seed.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

from .questions import CELLS, COLORS, KINDS, VOCABULARY, Digit, Question, ask

CANVAS, PATCH, CELL = 96, 8, 32
GRID = CANVAS // PATCH
VISION_TOKENS = GRID * GRID
SIZES = (14, 18, 22, 26, 30)
DIGITS_SHARES = (0.1, 0.25, 0.25, 0.22, 0.18)  # probability of 1..5 digits in a scene
EASY_SHARES = (0.3, 0.3, 0.2, 0.1, 0.1)  # the same, at the beginning of training
NOISE = 8.0  # standard deviation of the pixel noise, in grey levels
EVALUATION_SEED = 30

Pixels = NDArray[np.uint8]


class Scans(NamedTuple):
    """Handwritten digits: ``images`` float32 [n, 8, 8] in 0..1, ``values`` int64 [n]."""

    images: NDArray[np.float32]
    values: NDArray[np.int64]


class HeldOut(NamedTuple):
    """One evaluation record: a picture of held-out scans, a question about it and the true answer."""

    image: Image.Image
    kind: str
    question: str
    answer: str


class Batch(NamedTuple):
    """Training data for n scenes with m questions each."""

    pixels: torch.Tensor  # [n, 3, 96, 96] in -1..1
    slots: torch.Tensor  # [n, m, 5] token ids: four question words and the answer
    kinds: torch.Tensor  # [n, m] indices into KINDS
    labels: torch.Tensor  # [n, 3, 144] digit, colour and size under each patch, counted from 1; 0 is background


def split_scans(held_out: bool) -> Scans:
    """The held-out quarter of the scans (stratified by digit), or the other three quarters."""
    data = load_digits()
    images, values = data.images.astype(np.float32) / 16.0, data.target.astype(np.int64)
    rng = np.random.default_rng(0)
    mask = np.zeros(len(values), bool)
    for value in range(10):
        where = np.flatnonzero(values == value)
        mask[rng.permutation(where)[: len(where) // 4]] = True
    chosen = mask if held_out else ~mask
    return Scans(images[chosen], values[chosen])


def enlarge(images: NDArray[np.float32], variants: int, seed: int) -> dict[int, Pixels]:
    """Scans at every size of ``SIZES``: side -> [variants, n, side, side]; variant 0 is plain, others are warped."""
    generator = torch.Generator().manual_seed(seed)
    framed = F.pad(torch.from_numpy(images)[:, None], (1, 1, 1, 1))  # [n, 1, 10, 10]: room for the warp
    n, out = len(images), {}
    for side in SIZES:
        rendered = []
        for variant in range(variants):
            u = torch.rand(n, 6, generator=generator) * 2 - 1
            u = torch.zeros_like(u) if variant == 0 else u
            cos, sin, shear = (u[:, 0] * 0.22).cos(), (u[:, 0] * 0.22).sin(), u[:, 1] * 0.2
            width, height = 0.9 + 0.1 * u[:, 2], 0.9 + 0.07 * u[:, 3]
            row_x = torch.stack([cos * width, (shear - sin) * height, u[:, 4] * 0.08], 1)
            row_y = torch.stack([sin * width, cos * height, u[:, 5] * 0.08], 1)
            grid = F.affine_grid(torch.stack([row_x, row_y], 1), [n, 1, side, side], align_corners=False)
            ink = F.grid_sample(framed, grid, mode="bicubic", align_corners=False)[:, 0].clamp(0, 1)
            rendered.append((ink * 255).round().to(torch.uint8))
        out[side] = torch.stack(rendered).numpy()
    return out


def backgrounds(n: int, seed: int) -> Pixels:
    """Dark low-frequency colour noise with strokes and specks in muted colours: [n, 96, 96, 3]."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 70, (n, 3, 6, 6)).astype(np.float32))
    smooth = F.interpolate(coarse, size=CANVAS, mode="bicubic", align_corners=False).clamp(0, 255)
    pictures = smooth.permute(0, 2, 3, 1).numpy()
    for picture in pictures:
        for _ in range(rng.integers(2, 6)):
            start, angle, length = rng.uniform(0, CANVAS, 2), rng.uniform(0, np.pi), rng.uniform(6, 22)
            way = np.arange(0, length, 0.5)[:, None] * np.array([np.cos(angle), np.sin(angle)])
            stroke = (start + way).astype(int) % CANVAS
            picture[stroke[:, 1], stroke[:, 0]] = rng.uniform(40, 170, 3)
        specks = rng.integers(0, CANVAS, (int(rng.integers(8, 30)), 2))
        picture[specks[:, 0], specks[:, 1]] = rng.uniform(60, 200, (len(specks), 3))
    out: Pixels = pictures.astype(np.uint8)
    return out


def patch_labels(digits: list[Digit]) -> NDArray[np.int64]:
    """[3, 144]: digit + 1, colour + 1 and size + 1 of the scan under each patch's centre, 0 where there is none."""
    labels = np.zeros((3, GRID, GRID), np.int64)
    centres = np.arange(GRID) * PATCH + PATCH / 2
    for d in digits:
        rows = np.abs(centres - d.top - d.side / 2) < d.side / 2
        columns = np.abs(centres - d.left - d.side / 2) < d.side / 2
        labels[:, rows[:, None] & columns] = np.array([[d.value + 1], [d.color + 1], [d.size + 1]])
    return labels.reshape(3, VISION_TOKENS)


class SceneSampler:
    """An endless, seeded source of scenes made of the given scans."""

    def __init__(self, scans: Scans, variants: int, seed: int, n_backgrounds: int = 1500) -> None:
        self.values = scans.values
        self.variants = variants
        self.ink = enlarge(scans.images, variants, seed)
        self.backgrounds = backgrounds(n_backgrounds, seed + 1)
        self.rng = np.random.default_rng(seed + 2)
        self.palette = np.array(list(COLORS.values()), np.float32)
        self.shares = DIGITS_SHARES

    def draw(self, dense: bool = False) -> tuple[Pixels, list[Digit]]:
        """One scene, [96, 96, 3], and its digits. ``dense`` fills all nine cells (more to learn a step)."""
        rng = self.rng
        picture = self.backgrounds[rng.integers(len(self.backgrounds))]
        picture = np.roll(picture, tuple(rng.integers(0, CANVAS, 2)), (0, 1))
        canvas = (picture[:, ::-1] if rng.random() < 0.5 else picture).astype(np.float32)
        count = len(CELLS) if dense else int(rng.choice(5, p=self.shares)) + 1
        cells = rng.permutation(len(CELLS))[:count]
        colors, sizes = rng.permutation(len(COLORS))[:count], rng.permutation(len(SIZES))[:count]
        if dense:  # nine scans: colours and sizes repeat
            colors, sizes = rng.integers(0, len(COLORS), count), rng.integers(0, len(SIZES), count)
        digits = []
        for cell, color, size in zip(cells.tolist(), colors.tolist(), sizes.tolist(), strict=True):
            side, scan = SIZES[size], int(rng.integers(len(self.values)))
            opacity = self.ink[side][rng.integers(self.variants), scan].astype(np.float32) / 255
            opacity = opacity[..., None] * np.float32(rng.uniform(0.8, 1.0))
            top, left = (int(i) for i in rng.integers(0, CELL - side + 1, 2))
            top, left = top + cell // 3 * CELL, left + cell % 3 * CELL
            area = canvas[top : top + side, left : left + side]
            area += opacity * (self.palette[color] + rng.uniform(-15, 15, 3).astype(np.float32) - area)
            digits.append(Digit(int(self.values[scan]), cell, color, size, top, left, side))
        canvas += rng.standard_normal(canvas.shape, np.float32) * NOISE
        out: Pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
        return out, digits

    def batch(self, n: int, questions: int = 0, dense: float = 0.0) -> Batch:
        """``n`` scenes with ``questions`` questions each; ``dense`` is the share of scenes with all cells filled."""
        pixels = np.empty((n, CANVAS, CANVAS, 3), np.uint8)
        labels = np.empty((n, 3, VISION_TOKENS), np.int64)
        asked: list[Question] = []
        for i in range(n):
            pixels[i], digits = self.draw(bool(dense) and bool(self.rng.random() < dense))
            labels[i] = patch_labels(digits)
            asked += ask(digits, questions, self.rng) if questions else []
        slots = [[VOCABULARY[word] for word in (*q.text.split(), q.answer)] for q in asked]
        kinds = [KINDS.index(q.kind) for q in asked]
        return Batch(
            torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1).contiguous(),
            torch.tensor(slots, dtype=torch.int64).reshape(n, questions, -1) if slots else torch.empty(n, 0, 5).long(),
            torch.tensor(kinds, dtype=torch.int64).reshape(n, questions),
            torch.from_numpy(labels),
        )


@cache
def _held_out_scans() -> Scans:
    return split_scans(held_out=True)


def held_out_questions(n: int, seed: int = EVALUATION_SEED, per_scene: int = 1) -> list[HeldOut]:
    """``n`` questions about scenes of held-out, unwarped scans, ``per_scene`` of them about each scene."""
    sampler = SceneSampler(_held_out_scans(), 1, seed, n_backgrounds=400)
    records: list[HeldOut] = []
    while len(records) < n:
        pixels, digits = sampler.draw()
        image = Image.fromarray(pixels)
        records += [HeldOut(image, *question) for question in ask(digits, per_scene, sampler.rng)]
    return records[:n]
