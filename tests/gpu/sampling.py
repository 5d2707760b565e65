"""Cooperative sampling, alone: if its programs do not run at the same time, it waits for ever.

timeout 60 python -m tests.gpu.sampling [--dry]
"""

from __future__ import annotations

import sys
import time

import torch

from vlmrewrite.kernels.greedy.sample import greedy
from vlmrewrite.passes.divprune import divprune_sample
from vlmrewrite.passes.sts import sts_sample
from vlmrewrite.testing.triton.interpreter import trustworthy

RULES = {"repulsion": sts_sample, "cosine": divprune_sample}
SHAPES = [  # images, tokens, channels, how many are chosen
    (1, 17, 24, 5),
    (1, 576, 4096, 64),
    (8, 576, 4096, 64),
    (1, 2880, 4096, 192),
    (3, 1000, 1152, 100),
    (200, 30, 64, 8),
]


def main() -> int:
    """Every shape under both rules and in two dtypes, against the reference on the CPU in fp64."""
    trustworthy()
    dry, worst = "--dry" in sys.argv, 1.0
    device = "cpu" if dry else "cuda"
    for images, tokens, channels, k in SHAPES[:1] if dry else SHAPES:
        for rule, reference in RULES.items():
            for dtype in (torch.float32, torch.bfloat16):
                generator = torch.Generator().manual_seed(0)
                x = torch.randn(images * tokens, channels, generator=generator).to(dtype)
                member = torch.ones(len(x), dtype=torch.bool)
                lengths, keep = torch.full((images,), tokens), torch.full((images,), k)
                begun = time.perf_counter()
                got, _ = greedy(rule, x.to(device), member.to(device), lengths, keep)
                chosen = got.cpu()
                seconds = time.perf_counter() - begun
                assert chosen.view(images, tokens).sum(1).eq(k).all(), "another number than was asked for"
                some = min(images, 2)
                wanted = reference(x[: some * tokens].double(), member[: some * tokens], lengths[:some], keep[:some])
                same = float((wanted & chosen[: some * tokens]).sum() / wanted.sum())
                worst = min(worst, same)
                print(
                    f"{rule} {images} x {tokens} x {channels}, {k}, {dtype}: {same:.4f} same, {seconds:.2f} s",
                    flush=True,
                )
    print(f"least share that fp64 chooses too: {worst:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
