"""How an image's vision tokens lie on the image: rows and columns, where they form a grid of known size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sizes:
    """What a model's inputs say about the sizes of images and videos.

    Attributes:
        images, videos: frames, rows and columns of patches of each one, before ``spatial_merge_size``, int [I, 3].
        frames: how many frames each video has, where there is no grid of it.
    """

    images: Tensor | None = None
    videos: Tensor | None = None
    frames: tuple[int, ...] = ()

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Sizes:
        """That of a forward's, or a generation's, arguments; of what was encoded before, with what was encoded."""
        told = {**(inputs.get("mm_encoder_outputs") or {}), **{k: x for k, x in inputs.items() if x is not None}}
        pixels = told.get("pixel_values_videos")
        frames = (pixels.shape[1],) * len(pixels) if isinstance(pixels, Tensor) and pixels.dim() == 5 else ()
        return cls(told.get("image_grid_thw"), told.get("video_grid_thw"), frames)

    def __bool__(self) -> bool:
        return self.images is not None or self.videos is not None or bool(self.frames)

    def video_frames(self) -> tuple[int, ...]:
        """How many frames each video has, as far as it is known."""
        return self.frames if self.videos is None else tuple(self.videos[:, 0].tolist())


def frame_grids(
    config: Any, frames: Sequence[Sequence[int]], videos: Sequence[bool], rows: Sequence[int], batch: int, sizes: Sizes
) -> list[tuple[int, int]] | str:
    """Rows and columns of each frame's vision tokens, in row-major order, or the reason why they are not known.

    Args:
        config: the model's.
        frames: tokens of each frame of each image and video, in order.
        videos: which of them are videos.
        rows, batch: as for :func:`grids`, of images and videos.
        sizes: what the model's inputs say.
    """
    images = [i for i, video in enumerate(videos) if not video]
    lengths, of_rows = [sum(frames[i]) for i in images], [rows[i] for i in images]
    found = grids(config, lengths, sizes.images, of_rows, batch) if images else torch.empty(0, 2)
    if isinstance(found, str):
        return found
    of_image, of_video = iter(found.tolist()), iter([] if sizes.videos is None else _merged(config, sizes.videos))
    made: list[tuple[int, int]] = []
    for of_frames, video in zip(frames, videos, strict=True):
        if not video:
            made.append(tuple(next(of_image)))
            continue
        t, h, w = next(of_video, (0, 0, 0))
        if t == len(of_frames) and set(of_frames) == {h * w}:
            made += [(h, w)] * t
            continue
        each = grids(config, of_frames, None)
        if isinstance(each, str):
            return f"of a video, {each}"
        made += map(tuple, each.tolist())
    return made


def _merged(config: Any, thw: Tensor) -> list[tuple[int, int, int]]:
    merge = int(getattr(getattr(config, "vision_config", None), "spatial_merge_size", 1))
    return [(int(t), int(h) // merge, int(w) // merge) for t, h, w in thw.tolist()]


def grids(
    config: Any, lengths: Sequence[int], thw: Tensor | None, rows: Sequence[int] = (), batch: int = 0
) -> Tensor | str:
    """Rows and columns of each image's vision tokens, in row-major order.

    Args:
        config: the model's; the size of its vision tower's grid is read from ``vision_config``.
        lengths: tokens of each image.
        thw: the grid input of models with images of any size: frames, rows and columns of patches of each image,
            int [I, 3], before ``spatial_merge_size``; or None. In a call in which each row of the prompt stands several
            times, those of the prompt may be given once.
        rows, batch: the row of each image, and how many rows there are.

    Returns:
        int64 [I, 2] on the CPU, or the reason why the tokens of some image do not form a known grid.
    """
    vision = getattr(config, "vision_config", None)
    if thw is not None:
        thw = _of_copies(thw, rows, batch)
        sizes = _merged(config, thw)
        if [t * h * w for t, h, w in sizes] != list(lengths) or any(t != 1 for t, _, _ in sizes):
            return f"the image grids {thw.tolist()} do not account for images of {list(lengths)} tokens"
        return torch.tensor([(h, w) for _, h, w in sizes], dtype=torch.int64, device="cpu")
    image, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    image, patch = (x[0] if isinstance(x, (list, tuple)) else x for x in (image, patch))
    if not isinstance(image, int) or not isinstance(patch, int):
        return "the vision config names no image_size and patch_size, and there is no image_grid_thw"
    side = image // patch
    for n in lengths:
        if math.isqrt(n) ** 2 != n or side % math.isqrt(n):
            return f"an image has {n} tokens, which is not a square grid of the tower's {side} x {side} patches"
    squares = [(math.isqrt(n), math.isqrt(n)) for n in lengths]
    return torch.tensor(squares, dtype=torch.int64, device="cpu").reshape(-1, 2)


def _of_copies(thw: Tensor, rows: Sequence[int], batch: int) -> Tensor:
    """The grids of a call in which each row of the prompt stands several times: one for each image."""
    images = len(rows)
    if not images or len(thw) in (0, images) or images % len(thw):
        return thw
    copies, in_row = images // len(thw), Counter(rows)
    sizes = [in_row[row] for row in range(0, batch, copies)]
    return torch.cat([of_row.repeat(copies, 1) for of_row in thw.split(sizes)]) if sum(sizes) == len(thw) else thw
