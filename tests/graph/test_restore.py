"""What stood on a model before a recipe is there after it, also after an apply that failed."""

from __future__ import annotations

import copy
import functools
import gc
import types
import weakref

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import vlmrewrite as vr
from vlmrewrite.hf.decoder import _COPIES
from vlmrewrite.passes import DPVR, STS, VISOR, FastV, Stride
from vlmrewrite.report import profile
from vlmrewrite.testing.models import FAMILIES, Row

SOME = [FastV(keep=2, at=1)]
ENCODER = [STS(keep=4, refine=None, features="encoder")]
HOW = {"do_sample": False, "max_new_tokens": 2}


@pytest.fixture
def tiny():
    return FAMILIES["llava"]()


def inputs_of(tiny):
    return tiny.inputs([Row(1, 2, 3)])


def counted(module, name, bound):
    """Gives a module a method of its own, bound to it or not; returns the list of its calls."""
    calls = []
    before = getattr(module, name)
    if bound:

        @functools.wraps(getattr(type(module), name))
        def mine(self, *args, **kwargs):
            calls.append(name)
            return getattr(type(self), name)(self, *args, **kwargs)

        setattr(module, name, types.MethodType(mine, module))
    else:
        setattr(module, name, functools.wraps(before)(lambda *a, **k: (calls.append(name), before(*a, **k))[1]))
    return calls


# ---- an instance's own methods


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("bound", [True, False], ids=["bound", "a function"])
def test_the_models_own_prepare_inputs_is_called_and_stays(tiny, bound):
    model, inputs = tiny.model, inputs_of(tiny)
    plain = model.generate(**inputs, **HOW)
    calls = counted(model, "prepare_inputs_for_generation", bound)
    own = vars(model)["prepare_inputs_for_generation"]
    for step in ("before", "applied", "after"):
        calls.clear()
        if step == "applied":
            with vr.applied(model, [Stride(keep=1.0)]):
                got = model.generate(**inputs, **HOW)
        else:
            got = model.generate(**inputs, **HOW)
        assert (step, len(calls)) == (step, 2)
        assert torch.equal(got, plain)
        assert vars(model)["prepare_inputs_for_generation"] is own


@pytest.mark.parametrize(
    "name", ["prepare_inputs_for_generation", "set_attn_implementation", "__deepcopy__", "__reduce_ex__"]
)
def test_what_the_model_has_of_its_own_is_put_back(tiny, name):
    def mine(*args, **kwargs):
        raise AssertionError

    vars(tiny.model)[name] = mine
    before = dict(vars(tiny.model))
    for recipe in (SOME, ENCODER, [DPVR(at=2, fuse=1)]):
        vr.restore(vr.apply(tiny.model, recipe))
        assert vars(tiny.model) == before
        assert list(vars(tiny.model)) == list(before)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("bound", [True, False], ids=["bound", "a function"])
def test_the_bases_own_encoder_is_called_and_stays(tiny, bound):
    base = tiny.model.model
    calls = counted(base, "get_image_features", bound)
    own = vars(base)["get_image_features"]
    with vr.applied(tiny.model, ENCODER, strict=True):
        tiny.model(**inputs_of(tiny))
    assert calls == ["get_image_features"]
    assert vars(base)["get_image_features"] is own


def taken_half_way(model):
    model.vlmrewrite_blocks = torch.nn.Identity()
    return [DPVR(at=2, fuse=1), *ENCODER], "has an attribute 'vlmrewrite_blocks' already"


def without_prepare(model):
    type(model).prepare_inputs_for_generation = property(lambda _: 1 / 0)
    return ENCODER, "division"


def used_elsewhere(model):
    other = type(model)(model.config).eval()
    other.model.language_model = model.model.language_model
    vr.apply(other, SOME)
    model._other = [other]
    return ENCODER, "another model, that a recipe is applied to"


@pytest.mark.parametrize("fail", [taken_half_way, without_prepare, used_elsewhere])
def test_a_failed_apply_takes_nothing_away(fail):
    class Own(LlavaForConditionalGeneration):
        pass

    model = FAMILIES["llava"]().model
    model.__class__ = Own
    recipe, message = fail(model)
    learning = [p.requires_grad for p in model.parameters()]
    configs = [id(m.config) for m in model.modules() if hasattr(m, "config")]
    for module, name in ((model, "set_attn_implementation"), (model.model, "get_image_features")):
        vars(module)[name] = types.MethodType(getattr(type(module), name), module)
    before = dict(vars(model)), dict(vars(model.model))
    with pytest.raises((ValueError, ZeroDivisionError), match=message):
        vr.apply(model, recipe)
    assert (vars(model), vars(model.model)) == before
    assert [p.requires_grad for p in model.parameters()] == learning
    assert [id(m.config) for m in model.modules() if hasattr(m, "config")] == configs


# ---- how long a model lives that is never restored


class OwnBase(LlavaForConditionalGeneration):
    """A model that is its own base_model."""

    base_model_prefix = ""

    def get_image_features(self, *args, **kwargs):
        return self.model.get_image_features(*args, **kwargs)


def own_of_everything(model):
    """Gives it methods of its own that hold the model."""
    for name in ("prepare_inputs_for_generation", "set_attn_implementation", "__deepcopy__"):
        method = getattr(model, name, None)
        vars(model)[name] = lambda *args, method=method, model=model: method and model and args
    return model


@pytest.mark.parametrize("recipe", [SOME, ENCODER, [DPVR(at=2, fuse=1)]], ids=["fastv", "encoder", "blocks"])
@pytest.mark.parametrize("kind", ["its own base", "plain", "its own methods"])
def test_a_model_that_is_never_restored_dies(kind, recipe):
    model = FAMILIES["llava"]().model
    model = OwnBase(model.config) if kind == "its own base" else model
    assert (model.base_model is model) is (kind == "its own base")
    model = own_of_everything(model) if kind == "its own methods" else model
    vr.apply(model, recipe)
    this = weakref.ref(model)
    del model
    gc.collect()
    gc.collect()
    assert this() is None


# ---- what wants an unmodified model


@torch.no_grad()
@pytest.mark.parametrize(
    "call",
    [
        lambda model, inputs: vr.calibrate(model, [VISOR(budget=0.5)], inputs),
        lambda model, inputs: vr.calibrate(model, [DPVR(at="auto", fuse=1)], inputs),
        vr.trace,
        profile,
        lambda model, inputs: vr.verify(model, inputs, SOME),
        lambda model, _: vr.apply(model, SOME),
    ],
    ids=["calibrate", "calibrate DPVR", "trace", "profile", "verify", "apply"],
)
def test_what_wants_an_unmodified_model_says_restore(tiny, call):
    with vr.applied(tiny.model, SOME), pytest.raises(ValueError, match=r"applied to this Llava\w* already; call"):
        call(tiny.model, inputs_of(tiny))


# ---- parts of a rewritten model in another place


@torch.no_grad()
@pytest.mark.parametrize("part", ["layers.1", "layers.2.self_attn", ""])
def test_a_part_that_was_copied_while_a_recipe_was_applied_is_named(tiny, part):
    model = tiny.model
    decoder = model.get_decoder()
    with vr.applied(model, SOME):
        new = copy.deepcopy(decoder.get_submodule(part))
    if part:
        decoder.set_submodule(part, new)
    else:
        model.model.language_model = new
    with pytest.raises(ValueError, match=rf"model\.language_model\S*{part}\S* of this Llava\w*, a Llama\w+, .*copied"):
        vr.apply(model, SOME)
    with pytest.raises(ValueError, match="has vlmrewrite's attention in its config"):
        vr.trace(model, inputs_of(tiny))


def test_a_part_of_a_model_that_is_gone_is_named(tiny):
    other = FAMILIES["llava"]().model
    vr.apply(other, SOME)
    tiny.model.model.language_model = other.model.language_model
    with pytest.raises(ValueError, match="another model, that a recipe is applied to"):
        vr.apply(tiny.model, SOME)
    del other
    gc.collect()
    gc.collect()
    with pytest.raises(ValueError, match=r"model\.language_model of this Llava\w*, a LlamaModel, .* taken from"):
        vr.apply(tiny.model, SOME)


# ---- the decoder's configs while a recipe is applied


@pytest.mark.slow
@torch.no_grad()
def test_private_configs_do_not_pile_up(tiny):
    model, inputs, held = tiny.model, inputs_of(tiny), []
    for _ in range(3):
        vr.verify(model, inputs, [DPVR(at=2, fuse=1)])
        held.append(len(_COPIES[model]))
    for _ in range(3):
        vr.trace(model, inputs)
        held.append(len(_COPIES[model]))
    for _ in range(3):
        vr.verify(model, inputs, [DPVR(at=1, fuse=1), DPVR(at=3, fuse=0)])
        held.append(len(_COPIES[model]))
    for _ in range(3):
        model.model.language_model.config = copy.copy(model.config.text_config)
        vr.restore(vr.apply(model, SOME))
        held.append(len(_COPIES[model]))
    assert [len(set(held[i : i + 3])) for i in (0, 3, 6, 9)] == [1, 1, 1, 1]


def test_the_decoders_own_config_comes_back_as_it_was(tiny):
    """As the README says: an edit of the copy that its modules read goes with the recipe."""
    decoder = tiny.model.get_decoder()
    own = decoder.config
    with vr.applied(tiny.model, SOME):
        decoder.config.marker = 1
        assert decoder.config is not own
    assert decoder.config is own
    assert not hasattr(own, "marker")
