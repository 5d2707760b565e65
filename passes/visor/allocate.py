"""Which layers a budget buys: self and cross layers where they matter most for what they cost."""

from __future__ import annotations

from collections.abc import Sequence


def spend(
    budget: float, freeze: Sequence[float], hide: Sequence[float], share: Sequence[float]
) -> tuple[list[int], list[int]]:
    """Buy self and cross layers where they matter most for what they cost.

    Greedily by measured effect per work: from text-only to cross a layer gains ``hide - freeze``, from cross to self
    ``freeze``. Ties go to the first layer.

    Args:
        budget: share of the work of all layers, in (0, 1].
        freeze, hide: what each layer loses as a cross layer and as a text-only layer, see LayerProfile.
        share: work of a cross layer, of that of a self layer.

    Returns:
        the self layers and the cross layers, ascending.
    """
    depth, left = len(freeze), budget * len(freeze) + 1e-9
    steps = [((hide[i] - freeze[i]) / share[i], 0, i, share[i]) for i in range(depth)]
    steps += [(freeze[i] / (1 - share[i]), 1, i, 1 - share[i]) for i in range(depth)]
    level = [0] * depth
    while True:
        open_steps = [s for s in steps if s[1] == level[s[2]] and s[3] <= left]
        if not open_steps:
            break
        _, kind, i, cost = max(open_steps, key=lambda s: (s[0], -s[2]))
        level[i], left = kind + 1, left - cost
    return [i for i in range(depth) if level[i] == 2], [i for i in range(depth) if level[i] == 1]
