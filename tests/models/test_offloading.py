"""Models whose weights accelerate brings while a module runs, and dispatch to one device: as without."""

from __future__ import annotations

import copy
import gc
import types
import weakref

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

import vlmrewrite as vr
from tests.small import exchange_linear
from vlmrewrite.hf.lent import Lent
from vlmrewrite.passes import DPVR, STS, VISOR, FastV, Stride
from vlmrewrite.testing.models import ZOO, Row

CPU = torch.device("cpu")
ROWS = [Row(1, 3, 4), Row(2, 1, 2)]
GREEDY = {"do_sample": False, "max_new_tokens": 4}
PASSES = [STS(keep=3, refine=2, at=1)]

pytestmark = pytest.mark.filterwarnings("ignore:.*offloaded:UserWarning")


def split(model, folder):
    """Layers 1 and 2 are on disk, all else stays where it is."""
    layers = [f"model.language_model.layers.{i}" for i in range(len(model.get_decoder().layers))]
    rest = [
        name for name, _ in model.named_modules() if not any(name.startswith(x) or x.startswith(name) for x in layers)
    ]
    places = dict.fromkeys(rest, "cpu") | dict.fromkeys(layers, "cpu") | dict.fromkeys(layers[1:3], "disk")
    accelerate.dispatch_model(model, places, offload_dir=str(folder), main_device="cpu")


WAYS = {
    "cpu": lambda model, _: accelerate.cpu_offload(model, execution_device=CPU),
    "buffers": lambda model, _: accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True),
    "disk": lambda model, folder: accelerate.disk_offload(model, str(folder), execution_device=CPU),
    "some layers": split,
}


def is_away(model):
    return all(p.is_meta for p in model.get_decoder().layers[1].parameters())


@pytest.mark.slow
@pytest.mark.wide
@torch.no_grad()
@pytest.mark.parametrize("first", ["apply", "offload"])
@pytest.mark.parametrize(("way", "name"), [("cpu", "llava"), ("buffers", "qwen2_5_vl"), ("disk", "gemma3"),
                                           ("some layers", "llava"), ("cpu", "qwen3_vl_moe")])  # fmt: skip
def test_offloaded_as_without(way, name, first, tmp_path):
    tiny = ZOO[name](layers=3)
    inputs, model = tiny.inputs(ROWS, side="left"), tiny.model
    plain = model(**inputs).logits
    with vr.applied(model, PASSES):
        logits, tokens, kept = model(**inputs).logits, model.generate(**inputs, **GREEDY), vr.kept_tokens(model)
    steps = [lambda: vr.apply(model, PASSES), lambda: WAYS[way](model, tmp_path)]
    for step in steps if first == "apply" else steps[::-1]:
        step()
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
    assert all(torch.equal(a.vision, b.vision) for a, b in zip(vr.kept_tokens(model), kept, strict=True))
    assert is_away(model)
    assert torch.equal(copy.deepcopy(model)(**inputs).logits, logits)
    assert vr.report(model).graphs["captured"] >= 1
    vr.restore(model)
    assert is_away(model)
    assert torch.equal(model(**inputs).logits, plain)
    with vr.applied(model, [FastV(keep=0.5, at=1), VISOR([0], [2])]):
        assert vr.verify(model, inputs) < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_one_weight_at_a_time(monkeypatch):
    tiny = ZOO["llava"](layers=4)
    inputs = tiny.inputs(ROWS)
    accelerate.cpu_offload(tiny.model, execution_device=CPU)
    brought, alive = Lent.brought, list[weakref.ref]()
    most = 0

    def watched(self):
        nonlocal most
        x = brought(self).clone()
        alive.append(weakref.ref(x))
        most = max(most, sum(ref() is not None for ref in alive))
        return x

    monkeypatch.setattr(Lent, "brought", watched)
    with vr.applied(tiny.model, PASSES):
        tiny.model(**inputs)
    assert len(alive) > 20
    assert most <= 2


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("change", ["a head of its own", "scaling", "dropout", "a forward around the hook"])
def test_what_changes_later_is_seen(change):
    tiny = ZOO["llava"](layers=3)
    inputs, model = tiny.inputs(ROWS[:1]), tiny.model
    layer = model.get_decoder().layers[1]
    plain = model(**inputs).logits
    layer.self_attn.attention_dropout = 0.0
    accelerate.cpu_offload(model, execution_device=CPU)
    vr.apply(model, [Stride(keep=1_000_000)])
    assert torch.allclose(model(**inputs).logits, plain, atol=1e-5)
    if change == "a head of its own":
        model.lm_head = nn.Linear(model.lm_head.in_features, model.lm_head.out_features, bias=False)
    elif change == "scaling":
        layer.self_attn.scaling = 2.0
    elif change == "dropout":
        model.train()
        model(**inputs)
        model.eval()
    else:
        hooked = layer.mlp.down_proj.forward
        layer.mlp.down_proj.forward = lambda x: 3 * hooked(x)
        with pytest.raises(RuntimeError, match="down_proj.weight is offloaded, and not by hooks on the whole model"):
            model(**inputs)
        return
    logits = model(**inputs).logits
    vr.restore(model)
    assert torch.allclose(model(**inputs).logits, logits, atol=1e-5)
    assert torch.allclose(logits, plain, atol=1e-3) == (change == "dropout")


@torch.no_grad()
def test_an_offloaded_model_dies():
    def used():
        tiny = ZOO["llava"](layers=2)
        inputs = tiny.inputs(ROWS)
        accelerate.cpu_offload(tiny.model, execution_device=CPU)
        vr.apply(tiny.model, PASSES)
        tiny.model(**inputs)
        return weakref.ref(tiny.model)

    model = used()
    gc.collect()
    assert model() is None


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("first", ["apply", "offload"])
@pytest.mark.parametrize(("name", "own"), [("llava_next", "image_newline"), ("blip_2", "query_tokens")])
def test_a_base_with_weights_of_its_own(name, own, first):
    """They are brought while it encodes; its hooked forward goes by the recipe, and restore gives it back.

    transformers 5.23 cannot generate with such a model, unmodified: it encodes outside of what brings them.
    """
    tiny = ZOO[name](layers=3)
    inputs, model = tiny.inputs(ROWS[:1]), tiny.model
    calls = [lambda: model(**inputs).logits] + [lambda: model.model(**inputs).last_hidden_state] * (
        name == "llava_next"
    )
    plain = [call() for call in calls]
    with vr.applied(model, PASSES):
        expected = [call() for call in calls]
    steps = [lambda: vr.apply(model, PASSES), lambda: accelerate.cpu_offload(model, execution_device=CPU)]
    for step in steps if first == "apply" else steps[::-1]:
        step()
    assert all(torch.equal(call(), x) for call, x in zip(calls, expected, strict=True))
    vr.restore(model)
    assert all(torch.equal(call(), x) for call, x in zip(calls, plain, strict=True))
    assert getattr(model.base_model, own).is_meta


@pytest.mark.slow
@torch.no_grad()
def test_hooks_come_and_go_while_a_recipe_is_applied():
    tiny = ZOO["llava"](layers=3)
    inputs, model = tiny.inputs(ROWS), tiny.model
    plain = model(**inputs).logits
    vr.apply(model, PASSES)
    logits = model(**inputs).logits
    for _ in range(2):
        accelerate.cpu_offload(model, execution_device=CPU)
        assert torch.equal(model(**inputs).logits, logits)
        hooks = {name: m._hf_hook for name, m in model.named_modules() if hasattr(m, "_hf_hook")}
        assert hooks
        remove_hook_from_module(model, recurse=True)
        assert not any(p.is_meta for p in model.parameters())
        assert torch.equal(model(**inputs).logits, logits)
    vr.restore(model)
    assert not vars(model).keys() & {"forward", "_old_forward"}
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("way", ["dispatch", "prepare"])
def test_one_device_is_as_without(way):
    tiny = ZOO["llava"](layers=3)
    inputs, model = tiny.inputs([Row(1, 3, 4)]), tiny.model
    with vr.applied(model, PASSES):
        expected = model(**inputs).logits
    put = {
        "dispatch": lambda model: accelerate.dispatch_model(model, {"": "cpu"}),
        "prepare": lambda model: accelerate.Accelerator(cpu=True).prepare(model),
    }
    model = put[way](model)
    with vr.applied(model, PASSES):
        assert torch.equal(model(**inputs).logits, expected)
        assert torch.equal(put[way](model)(**inputs).logits, expected)


class Doubling(ModelHook):
    """Somebody's own hook, that changes what comes out."""

    def post_forward(self, module, output):
        return output * 2


@pytest.mark.slow
@torch.no_grad()
def test_other_hooks_are_not_left_out():
    tiny = ZOO["llava"](layers=3)
    inputs = tiny.inputs(ROWS)
    accelerate.cpu_offload(tiny.model, execution_device=CPU)
    add_hook_to_module(tiny.model.get_decoder().layers[1].mlp, Doubling(), append=True)
    vr.apply(tiny.model, PASSES)
    with pytest.raises(RuntimeError, match="layers.1.mlp was exchanged on the instance"):
        tiny.model(**inputs)


def test_what_cannot_be_offloaded_is_refused():
    def offloaded(change=lambda decoder: None):
        model = ZOO["llava"](layers=3).model
        change(model.get_decoder())
        return accelerate.cpu_offload(model, execution_device=CPU)

    with pytest.raises(
        ValueError,
        match="recipe 'custom' has blocks .dpvr., and this .* is offloaded or on several devices: expected a reci",
    ):
        vr.apply(offloaded(), DPVR(at=1))
    with pytest.raises(ValueError, match=r"has accelerate's hooks, which say where .* \(apply takes this one\)"):
        vr.trace(offloaded(), {})
    model = offloaded()
    remove_hook_from_module(model)
    with pytest.raises(ValueError, match="is offloaded, and not by hooks on the whole model that bring plain weights"):
        vr.apply(model, PASSES)

    with pytest.raises(
        ValueError, match="is offloaded or on several devices, and has layers with a recurrent state or an index"
    ):
        vr.apply(accelerate.cpu_offload(ZOO["qwen3_5"](layers=3).model, execution_device=CPU), PASSES)

    def packed(linear):
        new = nn.Module()
        new.weight = nn.Parameter(torch.zeros_like(linear.weight, dtype=torch.int8), requires_grad=False)
        new.forward = types.MethodType(lambda self, x: x, new)
        return new

    with pytest.raises(ValueError, match="is offloaded, and not by hooks on the whole model that bring plain weights"):
        vr.apply(offloaded(lambda decoder: exchange_linear(decoder, packed)), PASSES)


@pytest.mark.slow
@torch.no_grad()
def test_offloaded_later_than_a_recipe_that_cannot():
    tiny = ZOO["llava"](layers=3)
    inputs = tiny.inputs(ROWS)
    vr.apply(tiny.model, DPVR(at=1))
    accelerate.cpu_offload(tiny.model, execution_device=CPU)
    with pytest.raises(NotImplementedError, match="weights are offloaded or on several devices, and blocks were"):
        tiny.model(**inputs)
    vr.restore(tiny.model)
    vr.apply(tiny.model, [Stride(0.5)], backend="inductor")
    with pytest.raises(
        NotImplementedError,
        match="weights are offloaded or on several devices, and are not there for backend='inductor'",
    ):
        tiny.model(**inputs)
