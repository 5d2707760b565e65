"""What PyTorch has of its own for choosing tokens, beside the kernels and their references."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmrewrite.bench.kernels.cases import KEPT, TEXT, Case, Setting, operator, size_of
from vlmrewrite.passes.dape import representatives


def score(s: Setting) -> Iterator[Case]:
    """Attention of the last token to the vision tokens, and the largest of it for each image."""
    b, heads, kv_heads, d = s.batch, s.size.heads, s.size.kv_heads, s.size.head
    q, k, bits, at = s.random(b, heads, 1, d), s.random(b, kv_heads, s.length, d), s.padding(), s.positions()
    vision = (at >= TEXT // 2) & (at < TEXT // 2 + s.size.tokens)
    flat = vision.flatten().nonzero()[:, 0]
    last, valid = at[:, -1:], torch.ones_like(vision)

    def matmul() -> Tensor:
        scores = (q.reshape(b, kv_heads, heads // kv_heads, d) @ k.transpose(2, 3)).float() * d**-0.5
        weights: Tensor = scores.masked_fill(~bits[:, None, None], float("-inf")).softmax(-1)
        return weights.mean((1, 2)).flatten()[flat]

    args = (q, k, bits, last, at, None, None, at, valid, flat, s.length)
    received = operator("attention_received", *args) | {"matmul and softmax": lambda: matmul}
    yield Case("score", "attention received", received, size_of(k), memory=size_of(k) * 4 * heads // kv_heads)

    _, member, lengths, keep = _images(s, s.size.tokens // KEPT)
    scores = torch.rand(len(member), device=s.device)

    def topk() -> Tensor:
        best = scores.view(b, -1).topk(int(keep[0]), sorted=False).indices
        return torch.zeros(b, s.size.tokens, dtype=torch.bool, device=s.device).scatter_(1, best, True).flatten()

    top = operator("top_attention", scores, member, lengths, keep, inductor=False) | {"topk": lambda: topk}
    yield Case("score", "largest of each image", top, size_of(scores, member, member), memory=8 * size_of(scores))


def _images(s: Setting, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features, members, lengths and budgets of an image in each row."""
    member = torch.ones(s.batch * s.size.tokens, dtype=torch.bool, device=s.device)
    lengths, keep = (torch.full((s.batch,), n, dtype=torch.int64) for n in (s.size.tokens, k))
    return s.random(len(member), s.size.hidden), member, lengths, keep


def _repel(x: Tensor, potential: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
    potential = potential + 1 / ((x - x.index_select(0, pick[None])).square().sum(1) + 1e-6)
    potential = potential.index_fill(0, pick[None], torch.inf)
    return potential, potential.argmin()


def _spread(x: Tensor, closest: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
    closest = closest.maximum((x * x.index_select(0, pick[None])).sum(1)).index_fill(0, pick[None], torch.inf)
    return closest, closest.argmin()


def _repel_matrix(x: Tensor, k: int) -> list[Tensor]:
    """As the reference, from the matrix of all distances."""
    inverse = 1 / (torch.cdist(x, x).square_() + 1e-6)
    pick = (x - x.mean(0)).square().sum(1).argmin()
    picks, potential = [pick], torch.zeros(len(x), device=x.device)
    for _ in range(k - 1):
        potential += inverse[pick]
        potential[pick] = torch.inf
        pick = potential.argmin()
        picks.append(pick)
    return picks


def _spread_matrix(x: Tensor, k: int) -> list[Tensor]:
    x = F.normalize(x, dim=1)
    cosine = x @ x.T
    pick = cosine.clone().fill_diagonal_(-torch.inf).amax(1).argmin()
    picks, closest = [pick], torch.full((len(x),), -torch.inf, device=x.device)
    for _ in range(k - 1):
        closest = closest.maximum(cosine[pick])
        closest[pick] = torch.inf
        pick = closest.argmin()
        picks.append(pick)
    return picks


def sample(s: Setting) -> Iterator[Case]:
    """STS's repulsion and DivPrune's max-min rule. Bytes count the features once for each token that is chosen."""
    tokens, k = s.size.tokens, min(s.sampled, s.size.tokens // 3)
    features, member, lengths, keep = _images(s, k)

    def mask(each: Callable[[Tensor], list[Tensor]]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            chosen = torch.zeros_like(member).view(s.batch, tokens)
            for row, x in zip(chosen, features.view(s.batch, tokens, -1), strict=True):
                row[torch.stack(each(x.float()))] = True
            return chosen.flatten()

        return run

    def compiled_step(step: Any, first: Any, start: float, normal: bool) -> Callable[[], Callable[[], Tensor]]:
        def prepare() -> Callable[[], Tensor]:
            compiled: Any = torch.compile(step, dynamic=False)

            def each(x: Tensor) -> list[Tensor]:
                x = F.normalize(x, dim=1) if normal else x
                picks, state = [first(x)], torch.full((len(x),), start, device=x.device)
                for _ in range(k - 1):
                    state, pick = compiled(x, state, picks[-1])
                    picks.append(pick)
                return picks

            return mask(each)

        return prepare

    def nearest_to_mean(x: Tensor) -> Tensor:
        return (x - x.mean(0)).square().sum(1).argmin()

    def farthest(x: Tensor) -> Tensor:
        return (x @ x.T).fill_diagonal_(-torch.inf).amax(1).argmin()

    for name, op, step, matrix in (
        ("repulsion", "sts_sample", compiled_step(_repel, nearest_to_mean, 0.0, False), _repel_matrix),
        ("max-min", "divprune_sample", compiled_step(_spread, farthest, -torch.inf, True), _spread_matrix),
    ):
        contenders = operator(op, features, member, lengths, keep, inductor=False)
        contenders |= {"inductor": step, "matrix": functools.partial(mask, functools.partial(matrix, k=k))}
        memory = 2 * size_of(features) + 16 * tokens * s.size.hidden + 12 * tokens**2
        yield Case("sample", name, contenders, k * size_of(features), memory=memory)


def regions(s: Setting) -> Iterator[Case]:
    """DAPE: a cover by half of the tokens, the averages of its regions, and splitting more of them."""
    tokens, b, at = s.size.tokens, s.batch, s.positions()
    side = next(n for n in range(math.isqrt(tokens), 0, -1) if tokens % n == 0)
    grid = torch.tensor([[side, tokens // side]] * b)
    features, everything, lengths, keep = _images(s, tokens // 2)
    vision = (at >= TEXT // 2) & (at < TEXT // 2 + tokens)
    flat, stream = vision.flatten().nonzero()[:, 0], s.random(b, s.length, s.size.hidden)
    yield Case(
        "regions",
        "cover",
        operator("dape_cover", features, stream, ~vision, flat, grid, everything, lengths, keep, inductor=False),
        size_of(features),
        memory=20 * size_of(features),
    )

    blocks = representatives(lengths, grid).to(s.device)
    cover = torch.zeros_like(everything)
    cover[blocks[2]] = True
    cover.view(b, tokens)[:, blocks[1, : tokens // 2]] = True
    shown = ~vision
    shown[vision] = cover
    index = shown.nonzero()[:, 1].view(b, -1)
    hidden = s.random(*index.shape, s.size.hidden)
    args = (hidden, index, vision.gather(1, index), stream, flat, lengths, grid)
    pooled = operator("dape_pool", *args)
    yield Case("regions", "pool", pooled, size_of(features, hidden, hidden), memory=12 * size_of(features))

    paid = torch.rand(len(cover), device=s.device)
    split = operator("dape_split", paid, features, grid, ~cover, lengths, keep // 4, inductor=False)
    yield Case("regions", "split", split, size_of(features), memory=12 * size_of(features))
