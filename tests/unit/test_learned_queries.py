"""Tokens that learned queries took from a whole image, which lie nowhere on it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from vlmrewrite.hf import grids, learned_queries


def test_tokens_of_learned_queries_are_no_grid():
    config = SimpleNamespace(vision_config=SimpleNamespace(image_size=16, patch_size=4))
    for thw in (None, torch.tensor([[1, 4, 4]])):
        assert "an image has 4 tokens, as many as the model has learned queries" in grids(config, [4], thw, queries={4})
        assert grids(config, [16], thw, queries={16}).tolist() == [[4, 4]], "they may be the positions of its patches"
        assert grids(config, [4], thw, queries={5, 16}).tolist() == [[2, 2]]


def test_which_tables_are_queries():
    class OwnLinear(nn.Linear):
        pass

    class Resampler(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Parameter(torch.zeros(1, 9, 4))
            self.maps = nn.ModuleList([OwnLinear(4, 25), nn.Linear(4, 16), nn.Embedding(36, 4), nn.LayerNorm(4)])

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.resampler, self.decoder = Resampler(), nn.Linear(4, 49)

        def get_decoder(self):
            return self.decoder

    assert learned_queries(Model()) == {9}
