"""What the decode kernels are compiled for ahead of time: caches of the models' sizes, on meta tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vlmrewrite.kernels.decode import decode_attention

SIZES = {  # B, H, Hk, n, m, D, Dv
    "llava": (1, 32, 32, 1, 640, 128, 128),
    "llava 8": (8, 32, 32, 1, 640, 128, 128),
    "llava_next 8": (8, 32, 32, 1, 2944, 128, 128),
    "qwen": (1, 28, 4, 1, 16448, 128, 128),
    "qwen 8": (8, 28, 4, 1, 4160, 128, 128),
    "qwen 5 queries": (2, 28, 4, 5, 4160, 128, 128),
    "qwen 16 queries": (2, 28, 4, 16, 131072, 128, 128),
    **{f"heads of {d}": (2, 32, 8, 1, 999, d, d) for d in (64, 80, 96, 256)},
    **{f"16 queries, heads of {d}": (2, 16, 4, 16, 999, d, d) for d in (64, 80, 96, 256)},
    "heads of 192 and 128": (2, 16, 16, 1, 999, 192, 128),
}


def _decode(b, h, heads, n, m, d, dv, dtype, **options):
    def make(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    k, v = make(b, heads, m + 64, d)[:, :, :m], make(b, heads, m + 64, dv)[:, :, :m]
    keys = make(b, m + 64, dtype=torch.int32)[:, :m]
    return decode_attention(make(b, h, n, d), k, v, make(b, n, dtype=torch.int32), keys, **options)


def cases() -> list[tuple[str, Callable[[], object]]]:
    found: list[tuple[str, Callable[[], object]]] = []
    for name, size in SIZES.items():
        for dtype in (torch.bfloat16, torch.float32):
            label = f"{name} {str(dtype).removeprefix('torch.')}"
            found.append((label, lambda a=(*size, dtype): _decode(*a)))
            if name in ("qwen 8", "qwen 16 queries", "heads of 256"):
                found.append(
                    (f"{label} softcap, window", lambda a=(*size, dtype): _decode(*a, softcap=50.0, window=4096))
                )
    found.append(("llava float16", lambda: _decode(*SIZES["llava"], torch.float16)))
    return found
