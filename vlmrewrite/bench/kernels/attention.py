"""What PyTorch has of its own for moving rows and for attention, beside the kernels and their references."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from vlmrewrite import ops
from vlmrewrite.bench.kernels.cases import KEPT, TEXT, Case, Setting, operator, size_of


def gather(s: Setting) -> Iterator[Case]:
    """Hidden states, rope tables and positions of the kept tokens."""
    index = s.positions(KEPT)
    n, (b, t, c, d) = index.shape[1], (s.batch, s.length, s.size.hidden, s.size.head)
    xs = [s.random(b, t, c), s.random(1, t, d), s.random(1, t, d), s.positions()]

    def torch_gather() -> list[Tensor]:
        return [
            x.expand(b, *x.shape[1:]).gather(1, index if x.dim() == 2 else index[..., None].expand(-1, -1, x.shape[2]))
            for x in xs
        ]

    library: dict[str, Any] = {"torch.gather": lambda: torch_gather}
    if b == 1:
        library["index_select"] = lambda: lambda: [x.index_select(1, index[0]) for x in xs]
    moved = 2 * n * b * (c + 2 * d) * xs[0].element_size() + 2 * n * b * 8
    contenders = operator("gather", xs, [1] * len(xs), index) | library
    yield Case("gather", "select", contenders, moved, memory=4 * size_of(*xs))


def restore(s: Setting) -> Iterator[Case]:
    """The kept tokens written over the full stream."""
    index, full = s.positions(KEPT), s.random(s.batch, s.length, s.size.hidden)
    part, valid = s.random(*index.shape, s.size.hidden), torch.ones_like(index, dtype=torch.bool)

    def scatter() -> Tensor:
        return full.scatter(1, index[..., None].expand_as(part), part)

    library: dict[str, Any] = {"torch.scatter": lambda: scatter}
    if s.batch == 1:
        library["index_copy"] = lambda: lambda: full.index_copy(1, index[0], part)
    contenders = operator("restore", full, part, index, valid) | library
    yield Case("gather", "restore", contenders, 2 * size_of(full), memory=6 * size_of(full))


def _visible(queries: Tensor, keys: Tensor) -> int:
    """Pairs of a query and a key that it sees."""
    seen = torch.searchsorted(keys.sort(1).values, queries, right=True) - (keys < 0).sum(1, keepdim=True)
    return int(seen.clamp(min=0).sum())


def _sdpa(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor) -> Callable[[], Tensor]:
    """SDPA with its mask made before; rows that see nothing may differ."""
    seen = ops.seen_by_position(queries, keys).contiguous()
    gqa = q.shape[1] != k.shape[1]

    def run() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=gqa).transpose(1, 2)

    return run


def _flex(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor) -> Callable[[], Tensor]:
    """Compiled flex_attention with its block mask made before."""

    def visible(b: Tensor, _: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (keys[b, j] >= 0) & (keys[b, j] <= queries[b, i])

    size = q.shape[0], None, q.shape[2], k.shape[2]
    blocks = create_block_mask(visible, *size, device=q.device.type)
    compiled = torch.compile(flex_attention, dynamic=False)
    gqa = q.shape[1] != k.shape[1]

    def run() -> Tensor:
        return compiled(q, k, v, block_mask=blocks, enable_gqa=gqa).transpose(1, 2)

    return run


def attention(s: Setting) -> Iterator[Case]:
    """Causal without padding; with padding; of the kept tokens; and of the text to all tokens."""
    every, some = s.positions(), s.positions(KEPT)
    text = torch.cat([every[:, : TEXT // 2], every[:, -TEXT // 2 :]], 1)
    for name, queries, keys, bits in (
        ("plain causal", every, every, None),
        ("padded", every, every, s.padding()),
        ("kept tokens, padded", some, some, s.padding()),
        ("text to all, padded", text, every, s.padding()),
    ):
        yield _attention(s, name, queries, keys, bits)


def _attention(s: Setting, name: str, q_pos: Tensor, k_pos: Tensor, bits: Tensor | None) -> Case:
    (b, n), m = q_pos.shape, k_pos.shape[1]
    q = s.random(b, s.size.heads, n, s.size.head)
    k, v = (s.random(b, s.size.kv_heads, m, s.size.head) for _ in range(2))
    if bits is not None:
        q_pos = torch.where(bits.gather(1, q_pos), q_pos, -1)
    queries, keys, blocks = ops.attention_blocks(bits, q_pos, k_pos)
    library: dict[str, Any] = {
        "sdpa, mask": lambda: _sdpa(q, k, v, queries, keys),
        "flex": lambda: _flex(q, k, v, queries, keys),
    }
    if name == "plain causal":
        gqa = q.shape[1] != k.shape[1]
        sdpa = functools.partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=gqa)
        library["sdpa, causal"] = lambda: lambda: sdpa().transpose(1, 2)
    return Case(
        "attention",
        name,
        operator("positional_attention", q, k, v, queries, keys, blocks) | library,
        flops=4 * s.size.heads * s.size.head * _visible(queries, keys),
        memory=3 * size_of(q, q, k, v) + 8 * b * n * m,
    )


def decode(s: Setting) -> Iterator[Case]:
    """One token after the prompt, rows padded."""
    b, heads, d = s.batch, s.size.kv_heads, s.size.head
    q, k, v = s.random(b, s.size.heads, 1, d), s.random(b, heads, s.length, d), s.random(b, heads, s.length, d)
    queries = torch.full((b, 1), s.length - 1, dtype=torch.int32, device=s.device)
    keys = ops.unhidden(s.padding(), s.positions())
    library: dict[str, Any] = {
        "sdpa, mask": lambda: _sdpa(q, k, v, queries, keys),
        "flex": lambda: _flex(q, k, v, queries, keys),
    }
    contenders = operator("decode_attention", q, k, v, queries, keys) | library
    yield Case(
        "decode", "one token, padded", contenders, size_of(k, v), memory=size_of(k, v) * 3 * s.size.heads // heads
    )
