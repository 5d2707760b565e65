"""Layers that are alike are traced once, and a graph is what a trace of all of them gives."""

from __future__ import annotations

import logging
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import vlmrewrite as vr
from tests.depth import same_graphs
from vlmrewrite.capture import CapturedForward, captures_of
from vlmrewrite.passes import Stride
from vlmrewrite.testing.models import ZOO, Row, TinyVLM

pytestmark = pytest.mark.usefixtures("unshared")

ROWS = [Row(1, 3, 2), Row(2, 1, 3)]


@pytest.fixture
def deep() -> TinyVLM:
    return ZOO["llava"](layers=6)


def forward_of(model: nn.Module) -> CapturedForward:
    return captures_of(model).call


def copies_of(model: nn.Module) -> dict[int, int]:
    found = forward_of(model)._alike
    assert found is not None
    return found.copies


def agrees(tiny: TinyVLM, model: nn.Module, **options: Any) -> None:
    """Whether an applied model's logits are those of a model like it, all of whose layers are traced."""
    with torch.no_grad():
        got = model(**tiny.inputs(ROWS, **options)).logits
        whole = ZOO[tiny.name](layers=6).model
        whole.load_state_dict(model.state_dict())
        forward_of(whole).whole = "a test wants it"
        with vr.applied(whole, [Stride(keep=0.5)]):
            assert torch.equal(got, whole(**tiny.inputs(ROWS, **options)).logits)


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "copies"),
    [
        ("llava", {1: 0, 2: 0, 3: 0, 4: 0, 5: 0}),
        ("gemma3", {2: 0, 4: 0, 3: 1}),  # two kinds of attention in turns
        ("deepseek_ocr2", {2: 1, 3: 1, 4: 1, 5: 1}),  # one layer of another kind first
        ("qwen3_vl", {1: 0, 2: 0, 3: 0, 4: 0, 5: 0}),  # images are added again between layers
    ],
)
def test_the_graph_is_that_of_a_whole_trace(name: str, copies: dict[int, int]) -> None:
    tiny = ZOO[name](layers=7)
    same_graphs(tiny, ROWS)
    assert copies_of(tiny.model) == copies
    assert forward_of(tiny.model).whole is None


@pytest.mark.slow
def test_a_family_whose_layers_return_more_is_traced_whole(caplog: pytest.LogCaptureFixture) -> None:
    tiny = ZOO["chameleon"](layers=5)
    with caplog.at_level(logging.INFO, "vlmrewrite"):
        same_graphs(tiny, ROWS)
    assert forward_of(tiny.model).whole == "more than a hidden state comes out of a layer"
    assert "all layers of ChameleonForConditionalGeneration are traced: more than a hidden state" in caplog.text
    assert len(forward_of(tiny.model).graphs) == 1


@pytest.mark.slow
def test_layers_that_are_called_in_another_way_are_traced_whole(deep: TinyVLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer returns is like its first tensor; here, that is another one than the hidden state."""
    decoder: Any = type(deep.model.get_decoder().layers[0])
    own = decoder.forward

    def swapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return own(self, kwargs.pop("hidden"), **kwargs)

    def calling(self: Any, hidden: Any, **kwargs: Any) -> Any:
        positions = kwargs.pop("position_ids")
        return nn.Module.__call__(self, position_ids=positions, hidden=hidden, **kwargs)

    monkeypatch.setattr(decoder, "forward", swapped)
    monkeypatch.setattr(decoder, "__call__", calling)
    same_graphs(deep, ROWS)
    assert forward_of(deep.model).whole is not None


@pytest.mark.slow
def test_padding_and_a_further_turn(deep: TinyVLM) -> None:
    with vr.applied(deep.model, [Stride(keep=0.5)]):
        agrees(deep, deep.model, side="left")
        assert copies_of(deep.model)
    found = vr.testing.generation_agreement(deep.model, deep.inputs(ROWS), [Stride(keep=0.5)], new_tokens=3)
    found.check()


@pytest.mark.slow
def test_parameters_that_are_exchanged_in_a_copied_layer(deep: TinyVLM) -> None:
    layer: Any = deep.model.get_decoder().layers[3]
    with torch.no_grad(), vr.applied(deep.model, [Stride(keep=0.5)]):
        deep.model(**deep.inputs(ROWS))
        layer.mlp.up_proj.weight.mul_(2)
        agrees(deep, deep.model)
        layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.detach() * 0.5)
        agrees(deep, deep.model)
        assert len(forward_of(deep.model).graphs) == 1


@pytest.mark.slow
def test_a_copied_layer_that_becomes_another(deep: TinyVLM) -> None:
    """A hook, another number: it is traced."""
    layer: Any = deep.model.get_decoder().layers[3]
    inputs = deep.inputs(ROWS)
    with torch.no_grad(), vr.applied(deep.model, [Stride(keep=0.5)]):
        before = deep.model(**inputs).logits
        hook = layer.mlp.register_forward_hook(lambda module, args, out: out * 2)
        hooked = deep.model(**inputs).logits
        assert copies_of(deep.model) == {1: 0, 2: 0, 4: 0}
        hook.remove()
        scaling = layer.self_attn.scaling
        layer.self_attn.scaling = 3 * scaling
        scaled = deep.model(**inputs).logits
        layer.self_attn.scaling = scaling
        assert not torch.equal(before, hooked)
        assert not torch.equal(before, scaled)
        assert not torch.equal(hooked, scaled)
        assert torch.equal(before, deep.model(**inputs).logits)
        graphs = len(forward_of(deep.model).graphs)
        assert torch.equal(before, deep.model(**inputs).logits)
        assert len(forward_of(deep.model).graphs) == graphs


@pytest.mark.slow
def test_a_layer_in_which_two_parameters_are_one(deep: TinyVLM) -> None:
    layers: Any = deep.model.get_decoder().layers
    layers[0].mlp.up_proj.weight = layers[0].mlp.gate_proj.weight
    with torch.no_grad(), vr.applied(deep.model, [Stride(keep=0.5)]):
        agrees(deep, deep.model)
        assert copies_of(deep.model) == {2: 1, 3: 1, 4: 1}


@pytest.mark.slow
def test_a_hook_on_all_modules_is_called_for_each(deep: TinyVLM) -> None:
    layers: Any = deep.model.get_decoder().layers
    seen: list[int] = []
    with torch.no_grad(), vr.applied(deep.model, [Stride(keep=0.5)]):
        deep.model(**deep.inputs(ROWS))
        hook = register_module_forward_hook(lambda module, args, out: seen.append(id(module)))
        try:
            deep.model(**deep.inputs(ROWS))
        finally:
            hook.remove()
    assert {id(layer.mlp) for layer in layers} <= {*seen}


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("at", [0, 2, 5])
def test_a_forward_of_its_own(deep: TinyVLM, at: int) -> None:
    layer: Any = deep.model.get_decoder().layers[at]
    with torch.no_grad(), vr.applied(deep.model, [Stride(keep=0.5)]):
        before = deep.model(**deep.inputs(ROWS)).logits
        layer.forward = types.MethodType(lambda self, x, **kwargs: type(self).forward(self, 2 * x, **kwargs), layer)
        doubled = deep.model(**deep.inputs(ROWS)).logits
        del layer.forward
        assert not torch.equal(before, doubled)
        assert torch.equal(before, deep.model(**deep.inputs(ROWS)).logits)


@pytest.mark.slow
def test_a_layer_in_training_mode(deep: TinyVLM) -> None:
    layer: Any = deep.model.get_decoder().layers[2]
    layer.self_attn.attention_dropout = 1.0
    with torch.no_grad(), vr.applied(deep.model, [Stride(keep=0.5)]):
        before = deep.model(**deep.inputs(ROWS)).logits
        layer.train()
        assert not torch.equal(before, deep.model(**deep.inputs(ROWS)).logits)
        layer.eval()
        assert torch.equal(before, deep.model(**deep.inputs(ROWS)).logits)


@pytest.mark.slow
def test_gradients_reach_copied_layers(deep: TinyVLM) -> None:
    with vr.applied(deep.model, [Stride(keep=0.5)]):
        deep.model(**deep.inputs(ROWS)).logits.sum().backward()
    layers: Any = deep.model.get_decoder().layers
    assert copies_of(deep.model)
    assert all(p.grad is not None and bool(p.grad.any()) for layer in layers for p in layer.parameters())


@pytest.mark.slow
def test_the_model_is_as_it_was(deep: TinyVLM) -> None:
    decoder: Any = deep.model.get_decoder()
    before = {name: dict(vars(m)) for name, m in decoder.named_modules()}
    with torch.no_grad(), vr.applied(deep.model, [Stride(keep=0.5)]):
        deep.model(**deep.inputs(ROWS))
    assert {name: dict(vars(m)) for name, m in decoder.named_modules()} == before


@pytest.mark.slow
@torch.no_grad()
def test_what_a_forward_leaves_on_the_model_is_left_there() -> None:
    """Qwen2.5-VL keeps the offset of its positions from one step to the next, a tensor, above its layers."""
    tiny = ZOO["qwen2_5_vl"](layers=4)
    model: Any = tiny.model
    inputs, other = tiny.inputs(ROWS, side="left"), tiny.inputs([Row(3, 1, 2), Row(1, 2, 3)], side="left", seed=1)
    expected = [model.generate(**x, max_new_tokens=4, do_sample=False) for x in (inputs, other)]
    kept = model.model.rope_deltas
    with vr.applied(model, [Stride(keep=1.0)]):
        for x, tokens in zip((inputs, other), expected, strict=True):
            assert torch.equal(model.generate(**x, max_new_tokens=4, do_sample=False), tokens)
        assert copies_of(model) == {1: 0, 2: 0}
        assert torch.equal(model.model.rope_deltas, kept)
        model.model.marked = "by its user"
        model(**inputs)
        assert model.model.marked == "by its user"


@pytest.mark.slow
def test_calls_of_all_sorts_capture_each_way_once(deep: TinyVLM) -> None:
    """Decoding between them, calls that are the same use the graph that is there."""
    model: Any = deep.model
    one, two, padded = deep.inputs(ROWS[:1]), deep.inputs(ROWS[1:]), deep.inputs(ROWS, side="left")
    counts = []
    with vr.applied(model, [Stride(keep=0.5)]):
        for inputs in (one, two, padded, one, padded):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
            counts.append(len(forward_of(model).graphs))
    assert counts == [1, 1, 2, 2, 2]
