"""How an image's vision tokens lie on the image: rows and columns, where they form a grid of known size."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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
        merge = int(getattr(vision, "spatial_merge_size", 1))
        sizes = [(int(t), int(h) // merge, int(w) // merge) for t, h, w in thw.tolist()]
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
