"""What the kernels of this family are compiled for ahead of time: real sizes of the models, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlmrewrite.kernels.gather import gather, restore

SIZES = {"llava": (640, 64, 4096), "llava_next": (2944, 288, 4096), "qwen": (16448, 1024, 3584), "odd": (701, 65, 1000)}


def _gather(length, n, channels, dtype, batch, more=0):
    def make(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    xs = [make(batch, length, channels), make(1, length, 128), make(batch, length, 128)]
    xs += [make(batch, length, dtype=torch.int64), make(batch, 1, length, length, dtype=torch.bool)]
    xs += [make(batch, length, channels)] * more
    return gather(xs, [1, 1, 1, 1, 2, *[1] * more], make(batch, n, dtype=torch.int64))


def _restore(length, n, channels, dtype, batch):
    full = torch.empty(batch, length, channels, dtype=dtype, device="meta")
    index = torch.empty(batch, n, dtype=torch.int64, device="meta")
    return restore(full, full[:, :n], index, index.bool())


def cases() -> list[tuple[str, Callable[[], object]]]:
    found: list[tuple[str, Callable[[], object]]] = []
    for name, size in SIZES.items():
        for dtype in (torch.bfloat16, torch.float32):
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            found.append((f"gather {label}", lambda a=(*size, dtype, 8): _gather(*a)))
            found.append((f"restore {label}", lambda a=(*size, dtype, 8): _restore(*a)))
    found.append(("gather 7", lambda: _gather(640, 64, 4096, torch.bfloat16, 1, 2)))
    return found
