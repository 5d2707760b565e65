"""What the kernels for regions are compiled for ahead of time: real sizes of the models, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlmrewrite.passes.dape.kernels import detail, matching, quadtree, regions

SIZES = {"llava": (8, 24, 24, 4096), "llava_next": (1, 48, 60, 4096), "qwen": (1, 128, 128, 3584), "odd": (3, 7, 9, 70)}


class _Inputs:
    def __init__(self, images: int, rows: int, columns: int, channels: int, dtype: torch.dtype) -> None:
        self.channels, self.dtype, n = channels, dtype, rows * columns
        self.grid, self.lengths = torch.tensor([[rows, columns]] * images), torch.tensor([n] * images)
        self.keep, slots = self.lengths // 2, n // 2
        self.hidden, self.stream = self.floats(images, slots, channels), self.floats(images, n + 100, channels)
        self.index = torch.empty(images, slots, dtype=torch.int64, device="meta")
        self.flat = torch.empty(images * n, dtype=torch.int64, device="meta")
        self.member = torch.empty(images * n, dtype=torch.bool, device="meta")
        self.prompt = torch.empty(images, n + 100, dtype=torch.bool, device="meta")
        self.features = self.floats(images * n, channels)
        self.attention = self.floats(images * n).float()

    def floats(self, *shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=self.dtype, device="meta")

    def cover(self, learned: bool) -> None:
        shapes = [(64, self.channels)] * 2 + [(self.channels,), (1,), (3,), (3,), (1,)] if learned else []
        matching.dape_cover(
            self.features, self.stream, self.prompt, self.flat, self.grid, self.member, self.lengths, self.keep,
            *(self.floats(*shape) for shape in shapes),
        )  # fmt: skip

    def rest(self) -> None:
        regions.region_owner(self.member, self.lengths, self.grid)
        quadtree.dape_split(self.attention, self.features, self.grid, self.member, self.lengths, self.keep)
        valid = self.index.bool()
        regions.dape_pool(self.hidden, self.index, valid, self.stream, self.flat, self.lengths, self.grid)
        shapes = [(64, self.channels)] * 3 + [(self.channels, 64), (1,)]
        detail.dape_inject(
            self.hidden, self.index, valid, self.attention, self.features, self.prompt, self.flat, self.lengths,
            self.grid, *(self.floats(*shape) for shape in shapes), 0.25,
        )  # fmt: skip


def cases() -> list[tuple[str, Callable[[], object]]]:
    found: list[tuple[str, Callable[[], object]]] = []
    for name, size in SIZES.items():
        for dtype in (torch.bfloat16, torch.float32):
            label, inputs = f"{name} {str(dtype).removeprefix('torch.')}", _Inputs(*size, dtype)
            found.append((f"regions {label}", inputs.rest))
            found.append((f"cover {label}", lambda i=inputs: i.cover(False)))
            found.append((f"learned cover {label}", lambda i=inputs: i.cover(True)))
    return found
