"""What the kernels of this family are compiled for ahead of time: real sizes of the models, on meta tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from vlmrewrite.kernels.greedy.sample import greedy

SIZES = {
    "llava": ([576], 4096, 96),
    "llava 8": ([576] * 8, 4096, 96),
    "llava 200": ([576] * 200, 4096, 96),
    "llava encoder": ([576], 1024, 192),
    "llava 13b": ([576], 5120, 96),
    "llava_next": ([2880], 4096, 96),
    "llava_next 8": ([2880] * 8, 4096, 96),
    "qwen 4096": ([4096], 3584, 409),
    "qwen 16384": ([16384], 3584, 192),
    "qwen 16384 8": ([16384] * 8, 3584, 1638),
    "mixed": ([16384, 1024], 3584, 1638),
    "odd": ([701, 65], 1001, 64),
    "odd 4096": ([4096], 1001, 64),
    "widest": ([577], 16384, 64),
    "widest odd": ([577], 16383, 64),
}


def _sample(rule: str, dtype: torch.dtype, lengths: list[int], channels: int, keep: int) -> object:
    features = torch.empty(sum(lengths), channels, dtype=dtype, device="meta")
    member = torch.empty(sum(lengths), dtype=torch.bool, device="meta")
    return greedy(rule, features, member, torch.tensor(lengths), torch.full((len(lengths),), keep))


def cases() -> list[tuple[str, Callable[[], object]]]:
    return [
        (
            f"{rule} {name} {str(dtype).removeprefix('torch.')}",
            functools.partial(_sample, rule, dtype, *SIZES[name]),
        )
        for rule in ("repulsion", "cosine")
        for name in SIZES
        for dtype in (torch.bfloat16, torch.float32)
    ]
