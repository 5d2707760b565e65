"""Hooks that only read are given what the rewritten model computes, or are refused."""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import DynamicCache

import vlmrewrite as vr
from tests.small import crossed
from vlmrewrite.oracle import layer_masks
from vlmrewrite.oracle.hooks import masked
from vlmrewrite.passes import DPVR, STS, FastV, ShortV
from vlmrewrite.testing.models import FAMILIES, Row


@pytest.fixture(scope="module")
def tiny():
    return FAMILIES["llava"](layers=3)


@pytest.fixture
def inputs(tiny):
    return tiny.inputs([Row(1, 2, 3), Row(1, 5, 6)])


READ = {
    "as it is": lambda x: [x],
    "derived": lambda x: [x.detach(), x.clone(), x.double(), x.float().mean(-1), x[:, -1].detach()],
}
LAYERS = "model.language_model.layers"
INSIDE = ["mlp", "self_attn.q_proj", "self_attn.v_proj", "input_layernorm"]
PASSES = {
    "fastv": [FastV(keep=2, at=1)],
    "sts": [STS(keep=6, refine=3, at=2)],
    "shortv": [ShortV(layers=[1])],
    "dpvr": [DPVR(at=1, fuse=1)],
    "confidence": "visor-policy",
}


def reader(read, found):
    """A hook that keeps what comes out of a module."""
    return lambda _, __, out: found.extend(read(out[0] if isinstance(out, tuple) else out))


def reader_before(read, found):
    """A hook that keeps what goes into a module."""
    return lambda _, args: found.extend(read(args[0]))


def both(model, inputs, put):
    """What a hook is given in a rewritten call, and what the oracle says; ``put`` puts it on, for a list to fill."""
    found, expected = [], []
    with put(found):
        model(**inputs)
    rewritten, masks = model.__dict__.pop("forward"), layer_masks(model)
    with masked(model, masks), put(expected):
        model(**inputs, use_cache=False)
    model.__dict__["forward"] = rewritten
    return found, expected


@pytest.mark.slow
@pytest.mark.wide
@torch.no_grad()
@pytest.mark.parametrize(("read", "passes"), [*crossed(["derived"], PASSES), ("as it is", "fastv")])
def test_a_hook_that_reads_a_layer_is_given_the_stream_of_the_rewritten_model(tiny, inputs, passes, read):
    model, real = tiny.model, inputs["attention_mask"].bool()
    plain = model(**inputs).logits
    with vr.applied(model, PASSES[passes]):
        logits = model(**inputs).logits

        def put(found):
            stack = contextlib.ExitStack()
            for i in range(3):
                layer = model.get_submodule(f"{LAYERS}.{i}")
                stack.enter_context(layer.register_forward_hook(reader(READ[read], found)))
                if i and passes != "dpvr":  # whose tokens are back before the layer, for the oracle's hooks only
                    stack.enter_context(layer.register_forward_pre_hook(reader_before(READ[read], found)))
            return stack

        found, expected = both(model, inputs, put)
        assert len(found) == len(expected) >= 3
        for got, right in zip(found, expected, strict=True):
            of_tokens = real if got.shape[:2] == real.shape else slice(None)
            torch.testing.assert_close(got[of_tokens], right[of_tokens], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model(**inputs).logits, logits)
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.slow
@pytest.mark.wide
@torch.no_grad()
@pytest.mark.parametrize(
    ("where", "read"), crossed(["mlp", "self_attn.q_proj", "self_attn.v_proj", "input_layernorm"], READ)
)
def test_a_hook_that_reads_inside_a_rewritten_layer_is_refused(tiny, inputs, where, read):
    model = tiny.model
    plain = model(**inputs).logits
    with vr.applied(model, PASSES["fastv"]):
        logits, held = model(**inputs).logits, DynamicCache()
        with (
            model.get_submodule(f"{LAYERS}.2.{where}").register_forward_hook(reader(READ[read], [])),
            pytest.raises(ValueError, match=r"layer 2 is rewritten, and node .*modeling_llama.* is read by a hook"),
        ):
            model(**inputs, past_key_values=held)
        assert type(held) is DynamicCache
        assert held.get_seq_length() == 0
        assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.slow
@pytest.mark.wide
@torch.no_grad()
@pytest.mark.parametrize("where", ["layers.0.mlp", "layers.0.self_attn.q_proj", "norm", "layers.1.input_layernorm in"])
def test_a_hook_that_reads_around_the_rewritten_layers_is_given_what_is_there(tiny, inputs, where):
    model, real = tiny.model, inputs["attention_mask"].bool()
    name, before = where.removesuffix(" in"), where.endswith(" in")
    module = model.get_submodule(f"model.language_model.{name}")
    with vr.applied(model, PASSES["fastv"]):

        def put(found):
            if before:
                return module.register_forward_pre_hook(reader_before(READ["derived"], found))
            return module.register_forward_hook(reader(READ["derived"], found))

        (found, *_), (expected, *_) = both(model, inputs, put)
        torch.testing.assert_close(found[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_hook_that_writes_to_memory_of_its_own_behind_a_rewritten_layer_is_refused(tiny, inputs):
    model, kept = tiny.model, torch.zeros(())
    plain = model(**inputs).logits

    def hook(_, __, out):
        kept.add_(out.sum())

    with vr.applied(model, PASSES["fastv"]):
        logits = model(**inputs).logits
        told = pytest.raises(ValueError, match="a hook behind layer 1 cannot read the stream, node .*writes in place")
        with model.get_submodule(f"{LAYERS}.1").register_forward_hook(hook), told:
            model(**inputs)
        assert kept == 0
        assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.slow
@torch.no_grad()
def test_a_hook_that_writes_to_the_stream_behind_a_rewritten_layer_does_what_it_says(tiny, inputs):
    def in_place(_, __, out):
        out.mul_(2)

    found = []
    for hook in (in_place, lambda _, __, out: out * 2):
        layer = tiny.model.get_submodule(f"{LAYERS}.1")
        with vr.applied(tiny.model, PASSES["fastv"]), layer.register_forward_hook(hook):
            found.append(tiny.model(**inputs).logits)
    torch.testing.assert_close(*found)
