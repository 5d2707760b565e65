"""Trained blocks beside what other libraries put into a model: adapters, wrappers, and what they let learn."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vlmrewrite as vr
from tests.small import exchange_linear, losses
from vlmrewrite.compat import Apart
from vlmrewrite.hf import dequantise
from vlmrewrite.passes import DPVR
from vlmrewrite.plan import ATTRIBUTE
from vlmrewrite.testing.models import FAMILIES, Row

ROWS = [Row(1, 2, 3), Row(1, 1, 2)]


class Adapted(nn.Module):
    """A linear map with one of low rank beside it."""

    def __init__(self, base):
        super().__init__()
        self.in_features, self.out_features, self.bias = base.in_features, base.out_features, base.bias
        self.base_layer, self.dropout = base.requires_grad_(False), nn.Dropout(0.5)
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.b(self.a(self.dropout(x)))


class Bent(Adapted):
    """One that is not linear."""

    def forward(self, x):
        return super().forward(x).relu()


class Keeper(nn.Module):
    """What trains a copy of a module, and answers as it while it is in use."""

    def __init__(self, first):
        super().__init__()
        self.first, self.copy, self.in_use = (
            first.requires_grad_(False),
            copy.deepcopy(first).requires_grad_(True),
            True,
        )

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.copy if self.in_use else self.first, name)


def adapted(model):
    exchange_linear(model.get_decoder(), Adapted)
    for name, p in model.named_parameters():
        p.requires_grad_(".a." in name or ".b." in name)
    return model.eval()


def learning(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def tiny():
    return FAMILIES["llava"](layers=4)


@pytest.mark.slow
def test_a_copy_of_an_adapted_layer_holds_plain_weights(tiny):
    model, inputs = adapted(tiny.model), tiny.inputs(ROWS)
    before = learning(model)
    layer = model.get_decoder().layers[2]
    layer.train()
    vr.apply(model, [DPVR(at=2)])
    block = getattr(model, ATTRIBUTE)["dpvr"]
    assert type(block.self_attn.q_proj) is nn.Linear and block.self_attn.q_proj.training
    assert all(m.training for m in layer.modules())
    model.eval()
    q = layer.self_attn.q_proj
    torch.testing.assert_close(block.self_attn.q_proj.weight, q.base_layer.weight + q.b.weight @ q.a.weight)
    assert learning(model) == before | {n for n, _ in model.named_parameters() if n.startswith(ATTRIBUTE)}
    assert vr.verify(model, inputs) < 1e-4
    seen = losses(model, inputs, [p for p in model.parameters() if p.requires_grad], 0.05, 3)
    assert seen[-1] < seen[0]
    vr.restore(model)
    assert learning(model) == before


def test_adapters_that_come_after_the_blocks(tiny):
    model, inputs = tiny.model, tiny.inputs(ROWS)
    vr.apply(model, [DPVR(at=2)])
    names = [n for n, _ in getattr(model, ATTRIBUTE).named_parameters()]
    assert all(".q_proj" not in n for n, _ in getattr(model, ATTRIBUTE).named_modules())
    adapted(model)
    assert [n for n, _ in getattr(model, ATTRIBUTE).named_parameters()] == names
    assert vr.verify(model, inputs) < 1e-4
    before = learning(model)
    vr.restore(model)
    assert learning(model) == before, "what was frozen since stays so"


def test_a_map_that_is_not_linear_stays_as_it_is():
    block = nn.Sequential(Adapted(nn.Linear(8, 8)), Bent(nn.Linear(8, 8)))
    assert dequantise(block) == 0
    assert [type(m) for m in block] == [nn.Linear, Bent]
    assert {name.partition(".")[0] for name, _ in block[1].named_parameters()} == {"bias", "base_layer", "a", "b"}


@pytest.mark.slow
def test_a_copy_of_the_blocks_runs_while_it_is_in_use(tiny):
    model, inputs = tiny.model, tiny.inputs(ROWS)
    vr.apply(model, [DPVR(at=2)])
    first = model(**inputs).logits
    keeper = Keeper(getattr(model, ATTRIBUTE))
    setattr(model, ATTRIBUTE, keeper)
    assert torch.equal(model(**inputs).logits, first)
    losses(model, inputs, [p for p in model.parameters() if p.requires_grad], 0.5, 2)
    trained = model(**inputs).logits
    assert not torch.equal(trained, first)
    assert vr.verify(model, inputs) < 1e-4
    keeper.in_use = False
    assert torch.equal(model(**inputs).logits, first)
    keeper.in_use = True
    assert torch.equal(model(**inputs).logits, trained)
    made = copy.deepcopy(model)
    assert torch.equal(made(**inputs).logits, trained)
    assert isinstance(getattr(made, ATTRIBUTE), Keeper)
    setattr(model, ATTRIBUTE, nn.Identity())
    with pytest.raises(ValueError, match="a Identity stands where the blocks of the recipe were, and does not lead to"):
        model(**inputs)


@pytest.mark.parametrize(
    ("frozen", "others"),
    [("nothing", False), ("model.vision_tower", False), ("model.language_model.layers.0", True), ("", False)],
)
def test_what_learns_beside_the_blocks(tiny, frozen, others):
    """Nothing, unless somebody has chosen weights of the decoder's layers."""
    model = tiny.model
    if frozen != "nothing":
        model.get_submodule(frozen).requires_grad_(False)
    before = learning(model)
    vr.apply(model, [DPVR(at=2)])
    beside = {name for name in learning(model) if not name.startswith(ATTRIBUTE)}
    assert beside == (before if others else set())
    vr.restore(model)
    assert learning(model) == before


def test_parameters_that_are_one_keep_both_names():
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.weight = one.weight
    tree = nn.ModuleDict({"one": one, "other": other})
    tree.register_buffer("kept", torch.zeros(1))
    tree.register_buffer("left", torch.zeros(1), persistent=False)
    held = Apart(tree)
    assert held.state_dict().keys() == tree.state_dict().keys()
    assert dict(held.named_buffers()).keys() == {"kept", "left"}
    held.load_state_dict(tree.state_dict())
    with pytest.raises(RuntimeError, match='Unexpected key.*"three.weight"'):
        held.load_state_dict({**tree.state_dict(), "three.weight": torch.zeros(1)})
    half = held.to(torch.bfloat16)
    assert half.tree.one.weight.dtype == half.tree.kept.dtype == torch.bfloat16
