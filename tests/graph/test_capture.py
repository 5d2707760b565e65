"""Capture: few graphs, no silent fallback, exact attention, the encoder's features."""

from __future__ import annotations

import gc
import itertools
import os
import types
import warnings
import weakref

import pytest
import torch
import torch._dynamo
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import AttentionInterface

import vlmrewrite as vr
from vlmrewrite import ops
from vlmrewrite.analysis import analyse
from vlmrewrite.capture import CAPTURES, dynamo, hooks
from vlmrewrite.capture.dynamo import places_of
from vlmrewrite.hf import encoded_images
from vlmrewrite.kvcache.cache import PositionCache
from vlmrewrite.passes import STS, Random, Stride
from vlmrewrite.testing.agreement import forward_agreement
from vlmrewrite.testing.models import FAMILIES, ZOO, Row

pytestmark = pytest.mark.usefixtures("unshared")

SOME = [STS(keep=4, refine=2)]


@pytest.mark.slow
def test_ten_lengths_and_three_batch_sizes_make_a_handful_of_graphs():
    tiny = FAMILIES["llava"]()
    with vr.applied(tiny.model, SOME):
        for length, batch in itertools.product(range(1, 11), (1, 2, 3)):
            rows = [Row(1 + (i + length) % 2, length, 2 + i) for i in range(batch)]
            tiny.model.generate(**tiny.inputs(rows, side="left"), max_new_tokens=2)
        graphs = vr.report(tiny.model).graphs["captured"]
    assert graphs <= 4


@pytest.mark.slow
def test_applying_again_captures_nothing():
    tiny = FAMILIES["llava"]()
    inputs = tiny.inputs([Row(1)])
    for passes in (SOME, [Stride(keep=2)], [Random(keep=0.5, at=2)]):
        with vr.applied(tiny.model, passes):
            tiny.model.generate(**inputs, max_new_tokens=2)
    assert len(CAPTURES[tiny.model].call.graphs) == 1


@pytest.mark.slow
def test_models_do_not_share_a_limit():
    counts = []
    for _ in range(3):
        tiny = FAMILIES["llava"]()
        with vr.applied(tiny.model, SOME):
            tiny.model.generate(**tiny.inputs([Row(1)]), max_new_tokens=2)
            counts.append(vr.report(tiny.model).graphs["captured"])
    assert counts == [1, 1, 1]


@pytest.mark.slow
@pytest.mark.wide
@torch.no_grad()
@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_a_model_like_one_that_is_there_captures_nothing(name):
    first, second, wider = (ZOO[name](layers=5, seed=seed) for seed in (0, 1, 2))
    rows = [Row(1, 2, 3), Row(2, 1, 1)]
    wider.model.config.text_config.rope_theta = 1234.0  # what it says may matter to any stage
    for tiny in (first, second, wider):
        forward_agreement(tiny.model, tiny.inputs(rows, side="left"), SOME).check()
    made = [CAPTURES[tiny.model].call for tiny in (first, second, wider)]
    assert [len(one.graphs) for one in made] == [1, 1, 1]
    assert [len(one.seconds) for one in made] == [1, 0, 1]
    assert [one.copied for one in made] == [made[0].copied] * 3
    alive, (graph,) = weakref.ref(first.model), made[0].graphs
    assert made[1].graphs == [graph]
    assert made[2].graphs != [graph]
    del first, made, tiny
    gc.collect()
    assert alive() is None
    forward_agreement(second.model, second.inputs([Row(1, 4, 4), Row(1)], side="left"), SOME).check()
    assert CAPTURES[second.model].call.seconds == []
    second.model.model.language_model.layers[2].register_forward_hook(lambda *_: None)
    forward_agreement(second.model, second.inputs(rows, side="left"), SOME).check()
    assert len(CAPTURES[second.model].call.seconds) == 1


@pytest.mark.slow
@torch.no_grad()
def test_models_alike_have_graphs_each_up_to_the_limit(monkeypatch):
    first, second = (ZOO["llava"](layers=3, seed=seed) for seed in (0, 1))
    one, two = [Row(1)], [Row(1), Row(1)]
    monkeypatch.setattr(dynamo, "LIMIT", 1)
    with torch._dynamo.config.patch(recompile_limit=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tiny, this, that in ((first, one, two), (second, two, one)):
            with vr.applied(tiny.model, SOME):
                tiny.model(**tiny.inputs(this))
                with pytest.raises(RuntimeError, match="1 graphs of this model were compiled and the limit is reached"):
                    tiny.model(**tiny.inputs(that))
                tiny.model(**tiny.inputs(this))


@pytest.mark.slow
def test_the_limit_is_announced_and_never_passed_in_silence(monkeypatch):
    monkeypatch.setattr(dynamo, "LIMIT", 2)
    tiny = FAMILIES["llava"]()
    with torch._dynamo.config.patch(recompile_limit=2), vr.applied(tiny.model, SOME), torch.no_grad():
        with pytest.warns(UserWarning, match="1 graphs of LlavaForConditionalGeneration were captured; 2 is the limit"):
            tiny.model(**tiny.inputs([Row(1)]))
        with pytest.warns(UserWarning, match="2 graphs"):
            tiny.model(**tiny.inputs([Row(1), Row(1)]))
        with pytest.raises(RuntimeError, match="2 graphs of this model were compiled and the limit is reached"):
            tiny.model(**tiny.inputs([Row(1), Row(1, 5)]), logits_to_keep=1)


@pytest.mark.slow
def test_no_option_is_left_changed(llava):
    before = torch._dynamo.config.specialize_float, torch.fx.experimental._config.use_duck_shape, dict(os.environ)
    vr.trace(llava.model, llava.inputs([Row(1)]))
    after = torch._dynamo.config.specialize_float, torch.fx.experimental._config.use_duck_shape, dict(os.environ)
    assert after == before
    assert llava.model.config.text_config._attn_implementation in ("sdpa", "eager")


@pytest.mark.wide
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "gemma3"])
def test_a_rewritten_graph_never_waits_for_the_device(name):
    tiny = FAMILIES[name]()
    program = vr.rewrite(vr.trace(tiny.model, tiny.inputs([Row(1)])), [STS(keep=0.5)])
    assert not [n for n in program.graph_module.graph.nodes if n.target in ("item", "tolist", "nonzero")]


def test_text_on_a_cache_keeps_the_softcap():
    q, k, v = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0)).unbind()
    module, cache = types.SimpleNamespace(is_causal=True), PositionCache()
    for t in (slice(0, 3), slice(3, 4)):  # a prompt, and a decode step
        with hooks.running(cache):
            keys, values = cache.update(k[:, :, t], v[:, :, t], 0)
            got, _ = hooks.attention_forward(module, q[:, :, t], keys, values, None, softcap=0.5)
        expected = ops.attention(q[:, :, t], k[:, :, : t.stop], v[:, :, : t.stop], softcap=0.5)
        torch.testing.assert_close(got, expected)
        assert (got - ops.attention(q[:, :, t], k[:, :, : t.stop], v[:, :, : t.stop])).abs().max() > 0.01


@pytest.mark.slow
@torch.no_grad()
def test_a_library_wraps_all_attention_functions_and_calls_them_by_place(monkeypatch):
    """As kvpress does when it is imported; its wrapper also leaves a mark on the module, in prefill."""
    tiny = FAMILIES["llava"](layers=2)
    inputs, seen = tiny.inputs([Row(1, 2, 3), Row(2, 1, 1)], side="left"), []
    with vr.applied(tiny.model, [STS(keep=3)]):
        expected = tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False)

    def wrapped(own):
        def wrapper(module, query, key, value, attention_mask, dropout, **kwargs):
            if query.shape[2] == key.shape[2]:
                module.marked = None
            elif not torch.compiler.is_dynamo_compiling():
                seen.append(key.shape[2])
            return own(module, query, key, value, attention_mask, dropout, **kwargs)

        return wrapper

    known = AttentionInterface._global_mapping
    monkeypatch.setattr(AttentionInterface, "_global_mapping", {name: wrapped(own) for name, own in known.items()})
    monkeypatch.setattr(hooks, "register", lambda: None)
    monkeypatch.setattr("vlmrewrite.capture.register", lambda: None)
    with vr.applied(tiny.model, [STS(keep=3)]):
        assert torch.equal(tiny.model.generate(**inputs, max_new_tokens=4, do_sample=False), expected)
    assert seen


def test_features_are_found_by_what_they_are_whatever_their_name():
    tiny = FAMILIES["llava"]()
    inputs = tiny.inputs([Row(1), Row(2)])
    program = vr.trace(tiny.model, inputs)
    entering = program.captured.graph.find_nodes(op="placeholder")
    (merge,) = program.anatomy.merges
    at = entering.index(merge.features)
    features = torch.cat(tiny.model.model.get_image_features(inputs["pixel_values"]).pooler_output)
    assert torch.equal(program.inputs[at].flatten(0, -2), features)
    for i, node in enumerate(entering):
        node.name = f"input_{i}"
    again = analyse(program.captured, {"image": {"pooler_output": at}})
    assert (again.merges, again.layers) == (program.anatomy.merges, program.anatomy.layers)
    with pytest.raises(ValueError, match="the first attention node does not depend on the vision features"):
        analyse(program.captured, {"image": {"pooler_output": len(entering) - 1}})


def test_features_are_exactly_one_input():
    x, y = torch.zeros(2, 3), torch.zeros(2, 2, 3)
    images = encoded_images(BaseModelOutputWithPooling(last_hidden_state=y, pooler_output=x))
    last = images.candidates["last_hidden_state"]
    assert last.shape == (1, 4, 3) and last.data_ptr() == y.data_ptr(), "as of one image"
    assert places_of("image", images, [x.clone(), 3, x[:], x, last]) == {"pooler_output": 3, "last_hidden_state": 4}
    assert places_of("image", images, [x.clone(), last]) == {"last_hidden_state": 1}
    with pytest.raises(ValueError, match="2 of the graph's inputs are the image features, pooler_output; expected 1"):
        places_of("image", images, [x, x])
    with pytest.raises(ValueError, match="none of the graph's inputs is the video features; expected one of pooler_"):
        places_of("video", images, [x.clone(), x.view(2, 3)])


@pytest.mark.slow
def test_encoder_features(llava):
    """Selection by what the projector takes: the same policy, run by hand on the tower's output."""
    from vlmrewrite.passes.sts import sts_sample

    rows = [Row(2, 1, 2), Row(1, 3, 1)]
    inputs = llava.inputs(rows, side="left")
    taken = []
    handle = llava.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    llava.model(**inputs)
    handle.remove()
    x = taken[0]
    lengths = torch.full((3,), x.shape[1])
    flat = x.flatten(0, 1).detach()
    keep = torch.tensor([3, 3, 3])
    expected = sts_sample(flat, torch.ones(len(flat), dtype=torch.bool), lengths, keep)
    with vr.applied(llava.model, [STS(keep=3, refine=None, features="encoder")], strict=True):
        llava.model.generate(**inputs, max_new_tokens=2)
        stage = vr.kept_tokens(llava.model)[0]
        vision = inputs["input_ids"] == llava.image_token_id
        assert torch.equal(stage.vision[vision], expected)
        llava.model.generate(**inputs, max_new_tokens=2, num_beams=2)
        twice = vision.repeat_interleave(2, 0)
        assert torch.equal(vr.kept_tokens(llava.model)[0].vision[twice].view(2, -1)[0, : 2 * x.shape[1]],
                           torch.cat([expected[: 2 * x.shape[1]]]))  # fmt: skip
