"""A layer of each family can be copied, with new numbers of its class's own making."""

from __future__ import annotations

import pytest
import torch

from vlmrewrite.hf import decoder_layers
from vlmrewrite.plan import LayerCopy
from vlmrewrite.testing.models import ZOO


@pytest.mark.parametrize("name", sorted(ZOO))
def test_a_copy_with_new_numbers(name: str) -> None:
    model = ZOO[name](layers=1).model
    torch.manual_seed(0)
    block = LayerCopy(0, "random").build(model)
    layer = model.get_submodule(decoder_layers(model)[0])
    own, old = dict(block.named_parameters()), dict(layer.named_parameters())
    assert own.keys() == old.keys()
    changed = [n for n, p in own.items() if not torch.equal(p, old[n])]
    assert changed
    assert all(p.isfinite().all() for p in own.values())
