"""Hooks that users put on a rewritten model's modules run, whenever they were put there."""

from __future__ import annotations

import contextlib
import io
import pickle

import pytest
import torch
from transformers import DynamicCache

import vlmrewrite as vr
from vlmrewrite.oracle import layer_masks
from vlmrewrite.oracle.hooks import masked
from vlmrewrite.passes import DPVR, STS, FastV, ShortV, Stride
from vlmrewrite.testing.models import FAMILIES, Row

ALL = [Stride(keep=1000, at=1)]


def agree(got, expected, inputs):
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], expected[real], atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def tiny():
    return FAMILIES["llava"](layers=3)


@pytest.fixture
def inputs(tiny):
    return tiny.inputs([Row(1, 2, 3), Row(1, 5, 6)])


def more(_, __, out):
    return (out[0] + 3.0, *out[1:]) if isinstance(out, tuple) else out + 3.0


def scaled(_, args, kwargs):
    return (args[0] * 1.5, *args[1:]), kwargs


def plain_scaled(_, args):
    return (args[0] * 1.5, *args[1:])


HOOKS = {
    "layer": ("model.language_model.layers.1", "register_forward_hook", more, {}),
    "layer, before": ("model.language_model.layers.1", "register_forward_pre_hook", scaled, {"with_kwargs": True}),
    "attention": ("model.language_model.layers.2.self_attn.o_proj", "register_forward_hook", more, {}),
    "mlp": ("model.language_model.layers.0.mlp", "register_forward_pre_hook", plain_scaled, {}),
    "embedding": ("model.language_model.embed_tokens", "register_forward_hook", more, {}),
    "norm": ("model.language_model.norm", "register_forward_hook", more, {}),
    "tower": ("model.vision_tower", "register_forward_pre_hook", lambda *_: None, {}),
    "projector": ("model.multi_modal_projector", "register_forward_hook", more, {}),
}


def put(model, kind):
    name, how, hook, options = HOOKS[kind]
    return getattr(model.get_submodule(name), how)(hook, **options)


@torch.no_grad()
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_put_on_after_the_first_call_runs_until_it_is_removed(tiny, inputs, kind):
    model = tiny.model
    plain = model(**inputs).logits
    handle = put(model, kind)
    hooked = model(**inputs).logits
    handle.remove()
    with vr.applied(model, ALL):
        agree(model(**inputs).logits, plain, inputs)
        for _ in range(2):
            handle = put(model, kind)
            agree(model(**inputs).logits, hooked, inputs)
            handle.remove()
            agree(model(**inputs).logits, plain, inputs)


@torch.no_grad()
def test_a_hook_that_was_there_first(tiny, inputs):
    model = tiny.model
    plain = model(**inputs).logits
    with vr.applied(model, ALL):
        handle = put(model, "layer")
        hooked = model(**inputs).logits
        handle.remove()
        agree(model(**inputs).logits, plain, inputs)
    assert (hooked - plain).abs().max() > 1e-2


@torch.no_grad()
def test_a_hook_sees_every_call_in_prefill_and_decode(tiny, inputs):
    model, fired = tiny.model, []
    with vr.applied(model, [STS(keep=6, refine=3, at=2)]):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        layer = model.model.language_model.layers[2]
        handle = layer.register_forward_hook(lambda *_: fired.append(1))
        try:
            for n in (3, 6):
                model.generate(**inputs, max_new_tokens=3, do_sample=False)
                assert len(fired) == n
        finally:
            handle.remove()
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert len(fired) == 6


@torch.no_grad()
def test_a_hook_that_cannot_be_captured_is_named_in_the_error(tiny, inputs):
    model = tiny.model

    def looks(_, __, out):
        x = out[0] if isinstance(out, tuple) else out
        return out if x.sum().item() > 0 else None

    with vr.applied(model, ALL):
        handle = model.model.language_model.layers[1].register_forward_hook(looks)
        try:
            with pytest.raises(RuntimeError, match=r"hooks on model\.language_model\.layers\.1: expected hooks that"):
                model(**inputs)
        finally:
            handle.remove()
        model(**inputs)


# ---- what a rewritten model refuses, and says


@torch.no_grad()
@pytest.mark.parametrize("fullgraph", [False, True])
def test_torch_compile_of_a_rewritten_model_says_what_to_do(tiny, inputs, fullgraph):
    with vr.applied(tiny.model, ALL):
        expected = tiny.model(**inputs).logits
        compiled = torch.compile(tiny.model, backend="eager", fullgraph=fullgraph)
        with pytest.raises(RuntimeError, match=r"apply\(\.\.\., backend='inductor'\).*vlmrewrite\.restore\(model\)"):
            compiled(**inputs)
        torch.testing.assert_close(tiny.model(**inputs).logits, expected)
    torch._dynamo.reset_code_caches()


@torch.no_grad()
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda model: model.set_attn_implementation("eager"), r"its implementation cannot be set.*restore\(model\)"),
        (pickle.dumps, r"cannot be pickled.*restore\(model\)"),
        (lambda model: torch.save(model, io.BytesIO()), r"cannot be pickled.*restore\(model\)"),
    ],
    ids=["set_attn_implementation", "pickle", "torch.save"],
)
def test_what_cannot_be_done_while_a_recipe_is_applied(tiny, inputs, what, message):
    with vr.applied(tiny.model, ALL):
        expected = tiny.model(**inputs).logits
        with pytest.raises(ValueError, match=message):
            what(tiny.model)
        torch.testing.assert_close(tiny.model(**inputs).logits, expected)
    tiny.model.set_attn_implementation("eager")
    agree(tiny.model(**inputs).logits, expected, inputs)
    tiny.model.set_attn_implementation("sdpa")
    with vr.applied(tiny.model, ALL):
        agree(tiny.model(**inputs).logits, expected, inputs)


@torch.no_grad()
def test_a_hook_on_all_modules_runs_until_it_is_removed(tiny, inputs):
    model = tiny.model

    def on_norms(module, _, out):
        return out * 1.25 if type(module).__name__ == "LlamaRMSNorm" else None

    plain = model(**inputs).logits
    with torch.nn.modules.module.register_module_forward_hook(on_norms):
        hooked = model(**inputs).logits
    with vr.applied(model, ALL):
        agree(model(**inputs).logits, plain, inputs)
        with torch.nn.modules.module.register_module_forward_hook(on_norms):
            agree(model(**inputs).logits, hooked, inputs)
        agree(model(**inputs).logits, plain, inputs)


# ---- hooks that only read

READ = {
    "as it is": lambda x: [x],
    "derived": lambda x: [x.detach(), x.clone(), x.double(), x.float().mean(-1), x[:, -1].detach()],
}
LAYERS = "model.language_model.layers"
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


@torch.no_grad()
@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("passes", PASSES)
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


@torch.no_grad()
@pytest.mark.parametrize("read", READ)
@pytest.mark.parametrize("where", ["mlp", "self_attn.q_proj", "self_attn.v_proj", "input_layernorm"])
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


@torch.no_grad()
@pytest.mark.parametrize("how", ["in place", "into a buffer"])
def test_a_hook_that_writes_in_place_behind_a_rewritten_layer_is_refused(tiny, inputs, how):
    model, kept = tiny.model, torch.zeros(())
    plain = model(**inputs).logits

    def hook(_, __, out):
        _ = out.mul_(2) if how == "in place" else kept.add_(out.sum())

    with vr.applied(model, PASSES["fastv"]):
        logits = model(**inputs).logits
        told = pytest.raises(ValueError, match="a hook behind layer 1 cannot read the stream, node .*writes in place")
        with model.get_submodule(f"{LAYERS}.1").register_forward_hook(hook), told:
            model(**inputs)
        assert kept == 0
        assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model(**inputs).logits, plain)
