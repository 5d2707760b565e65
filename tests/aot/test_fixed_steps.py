"""Decode steps on a static cache, behind a compiler: one graph, whose inputs keep their shapes and places."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import StaticCache

import vlmrewrite as vr
from tests.caches import behind
from tests.small import family, long
from vlmrewrite.capture import CAPTURES
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.lower import decode_step
from vlmrewrite.ops import FREE, free_slots, kv_append
from vlmrewrite.passes import STS, FastV, Stride
from vlmrewrite.runtime import executables, text
from vlmrewrite.testing.models import FAMILIES, ZOO, Row

ONE, TWO = [Row(1, 2, 3)], [Row(1, 2, 3), Row(2, 1, 4)]
SOME, ALL = [STS(keep=6, refine=3, at=1)], [Stride(1.0)]
EXACT = {"atol": 1e-9, "rtol": 1e-9}
TOLD = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture
def garbage():
    """Memory that nothing was written to is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def generated(tiny, recipe, inputs, backend, **how):
    with torch.no_grad(), vr.applied(tiny.model, recipe, backend=backend):
        return tiny.model.generate(**inputs, **TOLD, min_new_tokens=how["max_new_tokens"], **how)


def same(got, expected):
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **EXACT)


@pytest.mark.slow
def test_one_graph_serves_prompts_of_all_lengths(as_they_are, seen):
    """Nothing changes from step to step but where the token, its position and the padding bits are."""
    tiny = FAMILIES["llava"](layers=4)
    tiny.model.requires_grad_(False)
    with vr.applied(tiny.model, SOME, backend="inductor"):
        for prompts, changing in (([ONE, [Row(1, 3, 3)], [Row(2, 2, 9)]], 2), ([TWO, [Row(1, 1, 9), Row(1, 2, 3)]], 3)):
            for rows in prompts:
                seen.clear()
                out = tiny.model.generate(
                    **tiny.inputs(rows, side="left"), **TOLD, max_new_tokens=7, cache_implementation="static"
                )
                first, *rest = seen
                moved = {i for one in rest for i, (a, b) in enumerate(zip(first, one, strict=True)) if a != b}
                assert len(rest) == 5 and len(moved) <= changing
                assert all(first[i][0] == one[i][0] for one in rest for i in moved)
                assert len(set(out.past_key_values.kv_lengths())) > 1  # each layer's room is its own
            assert len(CAPTURES[tiny.model].text.graphs) == changing - 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen2_5_vl", "qwen3_5"])  # the last one has recurrent layers
@pytest.mark.parametrize("recipe", [SOME, ALL], ids=["some", "all"])
def test_steps_of_a_fixed_size_are_the_others(name, recipe, seen, garbage):
    tiny = ZOO[name]() if name == "qwen3_5" else family(name, dtype=torch.float64)
    tiny.model.to(torch.float64).requires_grad_(False)
    recipe = [Stride(0.5)] if name == "qwen3_5" and recipe is SOME else recipe
    for rows in (ONE, TWO):
        inputs = tiny.inputs(rows, side="left")
        expected = generated(tiny, recipe, inputs, "eager", max_new_tokens=6)
        seen.clear()
        got = generated(tiny, recipe, inputs, "inductor", max_new_tokens=6, cache_implementation="static")
        same(got, expected)
        assert len(seen) == 5
        for layer, other in zip(got.past_key_values.attended, expected.past_key_values.attended, strict=True):
            assert torch.equal(layer.positions, other.positions) and layer.seen == other.seen
            torch.testing.assert_close(layer.keys, other.keys, **EXACT)
            torch.testing.assert_close(layer.values, other.values, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 3}], ids=str)
def test_beams_on_a_static_cache(how, seen, garbage):
    tiny = family("llava", dtype=torch.float64)
    inputs = tiny.inputs(TWO, side="left")
    expected = generated(tiny, SOME, inputs, "eager", max_new_tokens=5, **how)
    same(generated(tiny, SOME, inputs, "inductor", max_new_tokens=5, cache_implementation="static", **how), expected)
    assert len(seen) == 4


WAYS = {
    "step": lambda cache: cache,
    "crop": lambda cache: cache.crop(-2),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@pytest.mark.slow
@settings(max_examples=10)
@given(ways=st.lists(st.sampled_from([*WAYS, "two tokens", "eager", "image"]), min_size=2, max_size=8))
def test_whatever_is_done_to_the_cache_between_steps(ways):
    """Steps of other lengths, eager ones, turns with an image, copies; and the length is used up."""
    tiny, more = family("llava", dtype=torch.float64), None
    inputs, step = tiny.inputs(TWO, side="left"), torch.tensor([[9], [8]])
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_step, "behind", behind)
        patch.setattr(executables, "resolve", lambda *_: "eager")
        for backend in ("eager", "inductor"):
            logits, cache = [], StaticCache(tiny.model.config, inputs["input_ids"].shape[1] + 6)
            mask = inputs["attention_mask"]

            def run(cache, mask, logits=logits, **given):
                n = given["input_ids"].shape[1]
                mask = torch.cat([mask, mask.new_ones(2, n)], 1) if cache.get_seq_length() else mask
                out = tiny.model(**given, attention_mask=mask, past_key_values=cache)
                logits.append(out.logits[:, -1])
                return mask

            with torch.no_grad(), vr.applied(tiny.model, SOME, backend=backend):
                run(cache, mask, **{k: x for k, x in inputs.items() if k != "attention_mask"})
                for way in ways:
                    if way == "two tokens":
                        mask = run(cache, mask, input_ids=step.repeat(1, 2))
                    elif way == "eager":
                        patch.setattr(text, "resolve", lambda *_: "eager")
                        mask = run(cache, mask, input_ids=step)
                        patch.setattr(text, "resolve", lambda b, _: b)
                    elif way == "image":
                        more = tiny.inputs([Row(1, 1, 1), Row(1, 1, 1)], seed=1)
                        mask = run(cache, mask, **{k: x for k, x in more.items() if k != "attention_mask"})
                    else:
                        cache = WAYS[way](cache) or cache
                        mask = mask[:, : cache.get_seq_length()]
                        mask = mask.flip(0) if way == "reorder" else mask
                    mask = run(cache, mask, input_ids=step)
            results.append(torch.stack(logits))
    torch.testing.assert_close(results[1], results[0], **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [ONE, TWO][: 1 + long()], ids=len)
def test_inductor_writes_in_place(rows, garbage):
    tiny = FAMILIES["llava"](layers=3)
    tiny.model.requires_grad_(False)
    inputs = tiny.inputs(rows, side="left")
    expected = generated(tiny, [FastV(0.5, at=1)], inputs, "eager", max_new_tokens=6)
    with torch.no_grad(), vr.applied(tiny.model, [FastV(0.5, at=1)], backend="inductor"):
        got = tiny.model.generate(**inputs, **TOLD, max_new_tokens=1, cache_implementation="static")
        cache = got.past_key_values
        cache.length, where = cache.get_seq_length() + 6, []
        for i in range(1, 6):
            token = expected.sequences[:, i - 7, None]
            mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), i, dtype=torch.long)], 1)
            logits = tiny.model(input_ids=token, attention_mask=mask, past_key_values=cache).logits[:, -1]
            torch.testing.assert_close(logits, expected.logits[i], atol=1e-5, rtol=1e-5)
            where.append([layer.keys.data_ptr() for layer in cache.layers])
    assert all(a == b for a, b in itertools.pairwise(where))


def test_free_slots_are_those_behind_all_that_was_written():
    positions = torch.tensor([[0, -1, 2, FREE, FREE], [-1, 1, 2, FREE, FREE]])
    assert free_slots(positions, torch.tensor([[3], [3]])).tolist() == [3]
    keys, values = torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 2)
    k, v, pos = torch.randn(2, 1, 2, 4), torch.randn(2, 1, 2, 2), torch.tensor([[3, 4], [3, 4]])
    got = torch.ops.vlm.kv_append.default(keys, values, positions, k, v, pos, True)
    for one, new, end in zip(got, (k, v, pos), (-2, -2, -1), strict=True):
        assert torch.equal(one.narrow(end, 3, 2), new)
    assert torch.equal(got[0][:, :, :3], keys[:, :, :3])
    for half in (k, v), (k.half(), v.half()):
        torch.library.opcheck(torch.ops.vlm.kv_append.default, (keys, values, positions, *half, pos, True))
    grown = kv_append(keys[:, :, :3], values[:, :, :3], positions[:, :3], k, v, pos)
    assert all(map(torch.equal, got, grown))


def test_a_cache_whose_length_is_not_known_stays_as_it_is(llava):
    with torch.no_grad(), vr.applied(llava.model, SOME):
        cache = llava.model(**llava.inputs(ONE)).past_key_values
        with cache.in_full(1) as full:
            assert not full and isinstance(cache, PositionCache)
        cache.length = cache.get_seq_length() + 1
        for more, expected in ((2, False), (1, True), (1, False)):
            with cache.in_full(more) as full:
                assert full is expected
