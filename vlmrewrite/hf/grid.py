"""How an image's vision tokens lie on the image: rows and columns, where they form a grid of known size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """What a model's inputs say about the sizes of images and videos.

    Attributes:
        images, videos: frames, rows and columns of patches of each one, before they are merged, int [I, 3]; of images
            of which it is pixels that are told, of pixels.
        frames: how many frames each video has, where there is no grid of it.
        within: of images whose pixels are told, rows and columns that they are padded to; else None.
    """

    images: Tensor | None = None
    videos: Tensor | None = None
    frames: tuple[int, ...] = ()
    within: tuple[int, ...] | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Sizes:
        """That of a forward's, or a generation's, arguments; of what was encoded before, with what was encoded."""
        told = {**(inputs.get("mm_encoder_outputs") or {}), **{k: x for k, x in inputs.items() if x is not None}}
        pixels = told.get("pixel_values_videos")
        frames = (pixels.shape[1],) * len(pixels) if isinstance(pixels, Tensor) and pixels.dim() == 5 else ()
        images, within = told.get("image_grid_thw"), None
        if images is None:
            images, within = _of_still_images(told)
        videos, many = told.get("video_grid_thw"), told.get("num_frames_per_video")
        if (
            videos is None
            and isinstance(many, Tensor)
            and (sides := _sides(told.get("video_position_ids"))) is not None
        ):
            videos = torch.cat([many[:, None], sides[many.cumsum(0) - many]], 1)  # of the first frame of each
        return cls(images, videos, frames, within)

    def __bool__(self) -> bool:
        return self.images is not None or self.videos is not None or bool(self.frames)

    def of_images(self) -> Tensor | None:
        """``images``, unless they are told in pixels that are not those of the padded images."""
        if self.images is None or self.within is None:
            return self.images
        return self.images if tuple(self.images[:, 1:].amax(0).tolist()) == self.within else None

    def video_frames(self) -> tuple[int, ...]:
        """How many frames each video has, as far as it is known."""
        return self.frames if self.videos is None else tuple(self.videos[:, 0].tolist())


def _of_still_images(told: Mapping[str, Any]) -> tuple[Tensor | None, tuple[int, ...] | None]:
    """Sizes of images as :class:`Sizes` has them, from inputs that have no axis of time, and what is padded to them."""
    pixels, sides = told.get("pixel_values"), _sides(told.get("image_position_ids"))
    for name in ("image_grid_hw", "spatial_shapes", "image_sizes"):
        sizes, within = told.get(name), None
        if not isinstance(sizes, Tensor) or sizes.dim() != 2 or sizes.shape[1] != 2:
            continue
        if name == "image_sizes":  # of the pixels as they are given, or of those before tiles were made of them
            if not isinstance(pixels, Tensor) or pixels.dim() != 4 or len(pixels) != len(sizes):
                continue
            within = tuple(pixels.shape[-2:])
        return torch.cat([torch.ones_like(sizes[:, :1]), sizes], 1), within
    return (None if sides is None else torch.cat([torch.ones_like(sides[:, :1]), sides], 1)), None


def _sides(places: Any) -> Tensor | None:
    """Rows and columns of patches, [I, 2], of images whose patches come with their column and row, [I, P, 2]."""
    told = isinstance(places, Tensor) and places.dim() == 3 and places.shape[2] == 2
    return (places.amax(1) + 1).flip(1) if told else None


def learned_queries(model: Any) -> frozenset[int]:
    """How many rows each table [rows, C] has that a model, but for its decoder, holds as a parameter by itself.

    Not those of torch's own modules, nor of classes made from its linear maps, convolutions and embeddings, nor what is
    named ``weight`` as in these: a router of experts is a linear map, too. Where an image has as many tokens as such a
    table has rows, and other than its patches, whose positions it might be, the tokens are what learned queries took
    from the whole image.
    """
    inside = {id(m) for m in model.get_decoder().modules()}
    maps = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    known = {m for m in model.modules() if isinstance(m, maps) or type(m).__module__.startswith(nn.__name__)}
    own = [m for m in model.modules() if id(m) not in inside and m not in known]
    tables = [p for m in own for name, p in m._parameters.items() if p is not None and p.dim() > 1 and name != "weight"]
    return frozenset(p.shape[-2] for p in tables if p.shape[:-2].numel() == 1 and p.shape[-2] > 1)


def frame_grids(
    config: Any,
    frames: Sequence[Sequence[int]],
    videos: Sequence[bool],
    rows: Sequence[int],
    batch: int,
    sizes: Sizes,
    picked: bool = False,
    queries: Collection[int] = (),
) -> list[tuple[int, int]] | str:
    """Rows and columns of each frame's vision tokens, in row-major order, or the reason why they are not known.

    Args:
        config: the model's.
        frames: tokens of each frame of each image and video, in order.
        videos: which of them are videos.
        rows, batch: as for :func:`grids`, of images and videos.
        sizes: what the model's inputs say.
        picked: whether some of the tower's features are not among the tokens.
        queries: see :func:`learned_queries`.
    """
    if picked:
        return "the model leaves out some of the vision tower's features, so that those left form no grid"
    images = [i for i, video in enumerate(videos) if not video]
    lengths, of_rows = [sum(frames[i]) for i in images], [rows[i] for i in images]
    found = grids(config, lengths, sizes.of_images(), of_rows, batch, queries) if images else torch.empty(0, 2)
    if isinstance(found, str):
        return found
    of_image, of_video = iter(found.tolist()), iter([] if sizes.videos is None else sizes.videos.tolist())
    made: list[tuple[int, int]] = []
    for of_frames, video in zip(frames, videos, strict=True):
        if not video:
            made.append(tuple(next(of_image)))
            continue
        t, h, w = next(of_video, (0, 0, 0))
        merged = _merged(h, w, of_frames[0]) if t == len(of_frames) and len(set(of_frames)) == 1 else None
        if merged is not None:
            made += [merged] * t
            continue
        each = grids(config, of_frames, None, queries=queries)
        if isinstance(each, str):
            return f"of a video, {each}"
        made += map(tuple, each.tolist())
    return made


def _merged(rows: int, columns: int, tokens: int) -> tuple[int, int] | None:
    """Rows and columns of tokens, if each was made of a square of as many patches; None if that does not come out."""
    side = math.isqrt(rows * columns // tokens) if tokens else 0
    if not side or rows % side or columns % side or rows * columns != tokens * side**2:
        return None
    return rows // side, columns // side


def grids(
    config: Any,
    lengths: Sequence[int],
    thw: Tensor | None,
    rows: Sequence[int] = (),
    batch: int = 0,
    queries: Collection[int] = (),
) -> Tensor | str:
    """Rows and columns of each image's vision tokens, in row-major order.

    Args:
        config: the model's; the size of its vision tower's grid is read from ``vision_config``.
        lengths: tokens of each image.
        thw: what is told of images of any size: frames, rows and columns of patches of each image, or of pixels,
            int [I, 3], before they are merged; or None. In a call in which each row of the prompt stands several times,
            those of the prompt may be given once.
        rows, batch: the row of each image, and how many rows there are.
        queries: see :func:`learned_queries`.

    Returns:
        int64 [I, 2] on the CPU, or the reason why the tokens of some image do not form a known grid.
    """
    vision = getattr(config, "vision_config", None)
    if thw is not None:
        thw = _of_copies(thw, rows, batch)
        sizes = thw.tolist() if len(thw) == len(lengths) else []
        made = [_merged(h, w, n) for (t, h, w), n in zip(sizes, lengths, strict=False) if t == 1]
        known = [size for size in made if size is not None]
        for (_, h, w), n in zip(sizes, lengths, strict=False):
            if n in queries and n != h * w:
                return _QUERIES.format(n)
        merges = {h // rows for (_, h, _), (rows, _) in zip(sizes, known, strict=False)}
        if len(known) != len(lengths) or len(merges) > 1:
            cut = f"; text stands between the tokens of some of the {len(thw)} images" * (len(thw) < len(lengths))
            return f"the image grids {thw.tolist()} do not account for images of {list(lengths)} tokens{cut}"
        return torch.tensor(known, dtype=torch.int64, device="cpu").reshape(-1, 2)
    image, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    image, patch = (x[0] if isinstance(x, (list, tuple)) else x for x in (image, patch))
    if not isinstance(image, int) or not isinstance(patch, int):
        return "the vision config names no image_size and patch_size, and no input tells the images' sizes"
    side = image // patch
    for n in lengths:
        if n in queries and n != side**2:
            return _QUERIES.format(n)
        if math.isqrt(n) ** 2 != n or side % math.isqrt(n):
            return f"an image has {n} tokens, which is not a square grid of the tower's {side} x {side} patches"
    squares = [(math.isqrt(n), math.isqrt(n)) for n in lengths]
    return torch.tensor(squares, dtype=torch.int64, device="cpu").reshape(-1, 2)


_QUERIES = "an image has {} tokens, as many as the model has learned queries, which lie nowhere on it"


def _of_copies(thw: Tensor, rows: Sequence[int], batch: int) -> Tensor:
    """The grids of a call in which each row of the prompt stands several times: one for each image."""
    images = len(rows)
    if not images or len(thw) in (0, images) or images % len(thw):
        return thw
    copies, in_row = images // len(thw), Counter(rows)
    sizes = [in_row[row] for row in range(0, batch, copies)]
    return torch.cat([of_row.repeat(copies, 1) for of_row in thw.split(sizes)]) if sum(sizes) == len(thw) else thw
