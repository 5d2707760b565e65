"""A cache whose layers hold different tokens: where later tokens stand in it, and what they see."""

from __future__ import annotations

import torch

from vlmrewrite import ops
from vlmrewrite.capture import running
from vlmrewrite.kvcache import PositionCache

HELD = [[[0, 1, 5, 8], [0, 2, 3, 4]], [[1, 2, 3, 4], [1, 2, 3, 4]]]
"""For each of two layers, the positions of four keys in each of two rows, of nine tokens that went by."""


def numbers(t):
    return torch.randn(2, 2, t, 8, generator=torch.Generator().manual_seed(t))


def filled():
    cache = PositionCache()
    with running(cache):
        for i, held in enumerate(HELD):
            cache.update(numbers(4), numbers(4), i)
            cache.layers[i].positions, cache.layers[i].seen = torch.tensor(held), 9
    return cache


def seen_by_the_next(cache, t, mask=None):
    """For each layer, which of its keys ``t`` more tokens see: bool [B, t, m], or None."""
    found = []
    with running(cache):
        for i, layer in enumerate(cache.layers):
            cache.update(numbers(t), numbers(t), i)
            seen = cache.seen_by(layer, numbers(t), mask, ops.visible)
            found.append(None if seen is None else seen[:, 0].tolist())
    return found


def test_slots_that_a_crop_empties_are_not_seen():
    cache = filled()
    cache.crop(-4)
    assert [layer.holes for layer in cache.layers] == [True, False]
    first, second = seen_by_the_next(cache, 1)
    assert first == [[[True, True, False, False, True]], [[True] * 5]]
    assert second is None, "every key is seen"
    assert cache.layers[0].positions.tolist() == [[0, 1, -1, -1, 5], [0, 2, 3, 4, 5]]


def test_more_tokens_stand_behind_all_that_went_by():
    cache = filled()
    bits = torch.ones(2, 11, dtype=torch.bool)
    bits[1, 3] = False
    rows = [True] * 4, [True, True, False, True]  # both layers hold position 3 of the second row third
    expected = [[[*row, True, False], [*row, True, True]] for row in rows]
    assert seen_by_the_next(cache, 2, bits) == [expected, expected]
    assert [layer.positions[0, -2:].tolist() for layer in cache.layers] == [[9, 10], [9, 10]]
    assert cache.get_seq_length() == 11


def test_each_layer_is_seen_by_what_it_holds():
    cache = filled()
    bits = torch.ones(2, 10, dtype=torch.bool)
    bits[:, 0] = False
    assert seen_by_the_next(cache, 1, bits) == [[[[False, *[True] * 4]]] * 2, [[[True] * 5]] * 2]
