"""What attention is compiled for ahead of time: every head size and dtype, and real sizes of the models."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlmrewrite.kernels.attention import positional_attention

HEADS = {torch.bfloat16: (64, 80, 96, 128, 256), torch.float16: (64,), torch.float32: (64, 80, 96, 128, 256)}
SIZES = {  # heads, heads of keys, queries, keys
    "llava": (32, 32, 640, 640),
    "llava text to all": (32, 32, 64, 640),
    "llava_next": (32, 32, 2944, 2944),
    "qwen 4096": (28, 4, 4160, 4160),
    "qwen 16384": (28, 4, 16448, 16448),
}


def _attention(heads, key_heads, n, m, d, dtype, dv=None, full=None, softcap=None, window=None, batch=8):
    def make(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    q = make(batch, n, heads, d).transpose(1, 2)
    k, v = make(batch, key_heads, m, d), make(batch, key_heads, m, dv or d)
    queries, keys, blocks = (make(batch, *x, dtype=torch.int32) for x in ((n,), (m,), (-(-n // 64), 4)))
    mask = None if full is None else make(1, 1, m, m, dtype=full)
    return positional_attention(q, k, v, queries, keys, blocks, mask, None, softcap, window)


def cases() -> list[tuple[str, Callable[[], object]]]:
    found: list[tuple[str, Callable[[], object]]] = []

    def add(name, *args, **kwargs):
        found.append((name, lambda: _attention(*args, **kwargs)))

    for name, size in SIZES.items():
        add(name, *size, 128, torch.bfloat16)
    for dtype, heads in HEADS.items():
        kind = str(dtype).removeprefix("torch.")
        for d in heads:
            add(f"{kind} {d}", 8, 2, 1024, 1024, d, dtype)
        for d in heads[-1:]:  # the one with the fewest registers left
            add(f"{kind} {d} softcap window", 8, 2, 1024, 1024, d, dtype, softcap=50.0, window=512)
            add(f"{kind} {d} full", 8, 2, 1024, 1024, d, dtype, full=torch.bool)
            add(f"{kind} {d} full additive", 8, 2, 1024, 1024, d, dtype, full=dtype)
        add(f"{kind} 128 values of 64", 8, 2, 1024, 1024, 128, dtype, 64)
    return found
