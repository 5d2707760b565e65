"""What of PyTorch's modules and tensors is private, and stands behind parameters that are shown apart."""

from __future__ import annotations

import torch
from torch import nn

from vlmrewrite import compat


def test_writes_to_a_tensor_are_counted():
    x = torch.zeros(2)
    before = compat.changes_of(x)
    assert (x + 1).sum() == 2
    assert compat.changes_of(x) == before
    x.add_(1)
    assert compat.changes_of(x) > before


def test_parameters_apart_from_their_modules():
    tree = nn.ModuleDict({"one": nn.Sequential(nn.Linear(2, 2))})
    held = compat.Apart(tree)
    assert [name for name, _ in held.named_parameters()] == ["one.0.weight", "one.0.bias"]
    assert [*held.named_modules()] == [("", held)]
    held.load_state_dict({name: torch.ones_like(x) for name, x in tree.state_dict().items()}, assign=True)
    assert compat.tree_in(held).one[0].weight.tolist() == [[1, 1], [1, 1]]
    assert held.tree.one[0].weight is dict(held.named_parameters())["one.0.weight"]
