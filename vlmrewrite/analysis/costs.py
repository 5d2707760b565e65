"""What the decoder layers of an anatomy cost under a plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from vlmrewrite.analysis.anatomy import Anatomy, Layer
from vlmrewrite.plan import Last, Plan, TokenCounts, TokenSet


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs in one call, all rows together.

    ``run`` and ``keys`` are the lengths, a row, of what it computes on and of what it attends to besides what the cache
    held before.
    """

    index: int
    run: int
    keys: int
    flops: int
    kv_bytes: int


def costs(
    anatomy: Anatomy, plan: Plan, counts: TokenCounts, past: int = 0, held: Sequence[int] = ()
) -> list[LayerCost]:
    """Tokens, matmul FLOPs and K/V bytes of each layer under a plan.

    A layer's FLOPs are those of its linear maps, once for each token set that they are computed for (a fused q, k and v
    projection twice, where a layer runs on another set than it attends to), of its attention over all pairs, of scoring
    vision tokens at its entry, and of a branch's block that leaves there. What an operator of a policy or an edit does
    inside is not known here and not counted; nor is the recurrence of a recurrent layer.

    Args:
        anatomy: of the model.
        plan: what each layer does.
        counts: of the call.
        past: logical length of the cache before the call.
        held: keys that each layer held before the call; without it, all of ``past``.
    """
    batch, out = len(counts.text), []
    for layer, entry in zip(anatomy.layers, plan.layers, strict=True):
        before = held[layer.owner] if held else past
        run, keys, mlp = entry.sets()
        maps: dict[TokenSet, dict[Node, int]] = defaultdict(dict)
        half = layer.second_half() if mlp != run else frozenset()
        maps[run] |= layer.queries | {n: f for n, f in layer.behind.items() if n not in half}
        maps[mlp] |= {n: f for n, f in layer.behind.items() if n in half}
        maps[keys] |= layer.keys | layer.values
        added = counts.size(keys)
        flops = layer.attention_flops(counts.size(run), added + before)
        for scored in plan.scored(layer.index):
            maps[Last] |= layer.queries
            maps[scored] |= layer.keys
            flops += 2 * layer.heads * layer.head_size * (counts.size(scored) + before)
        flops += sum(counts.size(s) * sum(found.values()) for s, found in maps.items())
        blocks = [b for b in plan.branches if b.leave == layer.index and b.block is not None]
        flops += sum(_block_flops(anatomy.layers[b.layer], counts.size(b.tokens)) for b in blocks)
        out.append(LayerCost(layer.index, counts.size(run), added, batch * flops, batch * added * layer.kv_bytes))
    return out


def _block_flops(layer: Layer, tokens: int) -> int:
    maps = layer.queries | layer.keys | layer.values | layer.behind
    return tokens * sum(maps.values()) + layer.attention_flops(tokens, tokens)
