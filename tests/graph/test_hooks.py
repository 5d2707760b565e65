"""Hooks that users put on a rewritten model's modules run, whenever they were put there."""

from __future__ import annotations

import warnings

import pytest
import torch

import vlmrewrite as vr
from vlmrewrite.passes import STS, Stride
from vlmrewrite.testing.models import FAMILIES, Row

ALL = [Stride(keep=1000, at=1)]
GREEDY = {"max_new_tokens": 3, "do_sample": False}


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


@pytest.mark.wide
@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.wide
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("how", [{}, {"mode": "reduce-overhead"}, {"backend": "eager"}, None], ids=str)
def test_torch_compile_of_a_rewritten_model_leaves_it_to_its_own_backend(tiny, inputs, how):
    model = tiny.model
    with vr.applied(model, ALL):
        expected, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        if how is None:
            model.compile()
        compiled = model if how is None else torch.compile(model, **how)
        with pytest.warns(UserWarning, match=r"compiles nothing: apply\(\.\.\., backend='inductor'\) does") as told:
            got = compiled(**inputs).logits, compiled(**inputs).logits
        assert torch.equal(got[0], expected) and torch.equal(got[1], expected)
        assert len([w for w in told if "compiles nothing" in str(w.message)]) == 1
        assert torch.equal(compiled.generate(**inputs, **GREEDY), tokens)
        model._compiled_call_impl = None
        assert torch.equal(model(**inputs).logits, expected)
    torch._dynamo.reset_code_caches()


@pytest.mark.slow
@torch.no_grad()
def test_torch_compile_as_one_graph_says_what_to_do(tiny, inputs):
    with vr.applied(tiny.model, ALL):
        expected = tiny.model(**inputs).logits
        with pytest.raises(RuntimeError, match=r"compiled by apply\(\.\.\., backend='inductor'\)"):
            torch.compile(tiny.model, backend="eager", fullgraph=True)(**inputs)
        assert torch.equal(tiny.model(**inputs).logits, expected)
    torch._dynamo.reset_code_caches()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
def test_torch_compile_around_one_that_is_compiled_says_nothing(tiny, inputs, monkeypatch):
    """Whatever Inductor makes of it."""
    monkeypatch.setattr("vlmrewrite.lower.pieces.inductor", lambda gm: gm)
    with vr.applied(tiny.model, ALL, backend="inductor"), warnings.catch_warnings():
        expected = tiny.model(**inputs).logits
        warnings.filterwarnings("error", ".*compiles nothing")
        torch.testing.assert_close(torch.compile(tiny.model)(**inputs).logits, expected)
    torch._dynamo.reset_code_caches()


@pytest.mark.slow
@torch.no_grad()
def test_the_attention_cannot_be_set_while_a_recipe_is_applied(tiny, inputs):
    with vr.applied(tiny.model, ALL):
        expected = tiny.model(**inputs).logits
        with pytest.raises(ValueError, match=r"its implementation cannot be set.*restore\(model\)"):
            tiny.model.set_attn_implementation("eager")
        torch.testing.assert_close(tiny.model(**inputs).logits, expected)
    tiny.model.set_attn_implementation("eager")
    agree(tiny.model(**inputs).logits, expected, inputs)
    tiny.model.set_attn_implementation("sdpa")
    with vr.applied(tiny.model, ALL):
        agree(tiny.model(**inputs).logits, expected, inputs)


@pytest.mark.slow
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
