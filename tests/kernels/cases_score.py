"""What the kernels of scores are compiled for ahead of time: prompts of the models' sizes, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlmrewrite.kernels.score import attention_received, top_attention

SIZES = {  # B, H, Hk, t, n, D
    "llava": (1, 32, 32, 1, 640, 128),
    "llava 8": (8, 32, 32, 1, 640, 128),
    "llava_next 8": (8, 32, 32, 1, 2944, 128),
    "qwen": (1, 28, 4, 1, 16448, 128),
    "qwen, 64 queries": (1, 28, 4, 64, 4160, 128),
    **{f"heads of {d}": (2, 32, 8, 1, 701, d) for d in (64, 80, 96, 256)},
    "64 queries, heads of 256": (2, 8, 4, 64, 701, 256),
}
MASKS = ("none", "bits", "bool", "added")


def _received(b, h, heads, t, n, d, dtype, mask="none", softcap=None):
    def make(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    made = {
        "none": lambda: None,
        "bits": lambda: make(b, n, dtype=torch.bool),
        "bool": lambda: make(b, 1, n, n, dtype=torch.bool),
        "added": lambda: make(b, 1, n, n),
    }[mask]()
    k = make(b, n, heads, d).transpose(1, 2)
    index, flat = make(b, n, dtype=torch.int64), make(b * n // 2, dtype=torch.int64)
    q_pos = make(b, t, dtype=torch.int64)
    return attention_received(make(b, h, t, d), k, made, q_pos, index, None, softcap, index, index.bool(), flat, n)


def _top(images, length, dtype):
    lengths = torch.full((images,), length)
    weights = torch.empty(images * length, dtype=dtype, device="meta")
    return top_attention(weights, torch.empty_like(weights, dtype=torch.bool), lengths, lengths // 4)


def cases() -> list[tuple[str, Callable[[], object]]]:
    found: list[tuple[str, Callable[[], object]]] = []
    for name, size in SIZES.items():
        for dtype in (torch.bfloat16, torch.float32):
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            found += [
                (f"{label} mask {mask}", lambda a=(*size, dtype, mask): _received(*a))
                for mask in (MASKS if name in ("llava 8", "qwen, 64 queries") else MASKS[:2])
            ]
    found.append(("llava softcap", lambda: _received(*SIZES["llava"], torch.bfloat16, softcap=50.0)))
    for length in (576, 2880, 4096, 16384, 50000):
        found.append((f"top {length}", lambda a=(8, length, torch.float32): _top(*a)))
    found.append(("top 576 bfloat16", lambda: _top(1, 576, torch.bfloat16)))
    return found
