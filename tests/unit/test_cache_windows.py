"""Layers that slide over a window: what no later token sees is let go, and nothing else."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

import vlmrewrite as vr
from tests.caches import MODES, allocated, forward, prefilled, tokens
from tests.small import family
from vlmrewrite.hf import Kept, cache_states
from vlmrewrite.kvcache import PositionCache
from vlmrewrite.kvcache import cache as cache_module
from vlmrewrite.kvcache import layer as layer_module
from vlmrewrite.kvcache.buffer import LEAST, SHARE
from vlmrewrite.passes import Stride
from vlmrewrite.testing.models import Row

LATE = 3
WITHOUT = ["no_grad", "inference"]
WINDOWS = {0: 5, 1: 5, 2: 9}
TOLD = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(layer_module, "LATE", LATE)


def sliding(cache: PositionCache) -> PositionCache:
    cache._windows = WINDOWS
    return cache


def seen_by_the_next(layer, window: int):
    """Of each row, the positions that a next token sees, and their keys and values."""
    rows = (layer.positions > layer.seen - window) & (layer.positions >= 0)
    of_token = zip(layer.positions, layer.keys.transpose(1, 2), layer.values.transpose(1, 2), rows, strict=True)
    return [[x[here].tolist() for x in held] for *held, here in of_token]


def lacking(layer, whole, window: int, tokens: int) -> bool:
    """Whether a layer has let go of what a next token would see without the last so many."""
    end = max(0, whole.seen - tokens)
    needed = whole.positions[(whole.positions > end - window) & (whole.positions < end)].unique()
    return not torch.isin(needed, layer.positions).all()


def with_holes(cache: PositionCache) -> PositionCache:
    """The second row has lost some of its tokens, in the same slots of all layers but the last."""
    lost = cache.layers[0].positions.clone()
    lost[1, 2:5] = -1
    for layer in cache.layers[:-1]:
        layer.positions, layer.holes = lost, True
    return cache


OPS = st.lists(
    st.one_of(
        st.tuples(st.just("forward"), st.integers(1, 7)),
        st.tuples(st.just("crop"), st.integers(1, 12)),
        st.tuples(st.just("rows"), st.sampled_from([[0], [1, 0], [1, 1, 0]])),
    ),
    max_size=25,
)


@pytest.mark.parametrize("small", [0, 1 << 17], ids=["buffers", "copies"])
@given(OPS, st.booleans(), st.sampled_from(WITHOUT))
def test_what_a_later_token_sees_is_there(small, ops, holes, mode):
    with pytest.MonkeyPatch.context() as patch, MODES[mode]():
        patch.setattr(layer_module, "SMALL", small)
        ours, whole = (with_holes(prefilled(8)) if holes else prefilled(8) for _ in range(2))
        sliding(ours)
        for seed, (what, how) in enumerate(ops):
            ours.let_go()
            before = copy.deepcopy(ours)
            if what == "crop":
                gone = any(lacking(ours.layers[i], whole.layers[i], n, how) for i, n in WINDOWS.items())
                with pytest.raises(RuntimeError) if gone else contextlib.suppress(RuntimeError if holes else ()):
                    ours.crop(-how)
                if ours.get_seq_length() == whole.get_seq_length():
                    assert ours.kv_lengths() == before.kv_lengths()
                    continue
                whole.crop(-how)
            for cache in (ours, whole):
                if what == "rows":
                    rows = torch.tensor(how) % len(cache.layers[0].positions)
                    cache.batch_select_indices(rows)
                elif what == "forward":
                    forward(cache, how, seed)
            for i, window in WINDOWS.items():
                a, b = ours.layers[i], whole.layers[i]
                assert a.seen == b.seen and a.positions.shape[1] == a.keys.shape[2] == a.values.shape[2]
                assert seen_by_the_next(a, window) == seen_by_the_next(b, window)
            assert ours.layers[0].positions is ours.layers[1].positions


@torch.no_grad()
def test_what_cannot_be_taken_back_is_refused():
    cache = sliding(prefilled(40))
    cache.let_go()
    expected = r"crop\(-4\) of a cache of 40 tokens: a layer that sees 5 of them let go .* at most 3 to remove"
    with pytest.raises(RuntimeError, match=expected):
        cache.crop(-4)
    assert (cache.get_seq_length(), cache.kv_lengths()) == (40, [7, 7, 11])
    cache.crop(-3)
    assert (cache.get_seq_length(), cache.kv_lengths()) == (37, [4, 4, 8])


@pytest.mark.parametrize("mode", WITHOUT)
def test_a_layer_that_slides_stays_as_large_as_its_window(mode, monkeypatch):
    monkeypatch.setattr(layer_module, "SMALL", 0)
    with MODES[mode]():
        cache = sliding(prefilled(40))
        for seed in range(200):
            cache.let_go()
            forward(cache, 1, seed)
            held = cache.kv_lengths()
            assert all(held[i] <= window + 2 * LATE for i, window in WINDOWS.items())
        room = [n + 1 + max(LEAST, n // SHARE) + 1 for n in held]
        of_token = sum(x.nbytes for x in tokens(2, 1, 0))
        assert allocated(cache) <= of_token * sum(room)


@torch.no_grad()
def test_what_is_to_go_back_keeps_all():
    cache = sliding(prefilled(40))
    cache.activate_past_recording()
    cache.let_go()
    cache.crop(-39)
    assert cache.kv_lengths() == [1, 1, 1]


@torch.no_grad()
@pytest.mark.parametrize("name", ["length", "steady"])
def test_a_length_that_is_known_or_a_compiler_keeps_all(name):
    cache = sliding(prefilled(40))
    setattr(cache, name, 60)
    cache.let_go()
    assert cache.kv_lengths() == [40, 40, 40]


@torch.no_grad()
def test_what_is_filled_anew_is_whole():
    cache = sliding(prefilled(40))
    cache.let_go()
    cache.crop(-40)
    forward(cache, 7, 0)
    cache.crop(-6)
    assert cache.kv_lengths() == [1, 1, 1]


def test_what_gradients_are_recorded_for_stays():
    cache = sliding(prefilled(40))
    cache.let_go()
    assert cache.kv_lengths() == [40, 40, 40]


@torch.no_grad()
def test_nothing_is_wanted_from_the_device_until_there_is_something_to_let_go(monkeypatch):
    """A look at positions waits for a GPU: one in so many steps."""
    cache, looks = sliding(prefilled(9)), []
    real = layer_module.once
    monkeypatch.setattr(layer_module, "once", lambda *given: looks.append(1) or real(*given))
    let_go = 0
    for seed in range(60):
        looks.clear()
        cache.let_go()
        let_go += len(looks)
        forward(cache, 1, seed)
    assert let_go <= 3 * (60 // LATE + 1)


CACHES = {
    "without a config": (lambda config, n: DynamicCache(), True),
    "with one": (lambda config, n: DynamicCache(config=config), False),
    "static": (lambda config, n: StaticCache(config, n), True),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CACHES)
def test_caches_that_are_given(kind):
    tiny, (make, keeps) = family("gemma3"), CACHES[kind]
    inputs = tiny.inputs([Row(1, 6, 3)])
    cache = make(tiny.model.config, inputs["input_ids"].shape[1] + 30)
    with torch.no_grad(), vr.applied(tiny.model, [Stride(0.5)]):
        tiny.model.generate(**inputs, max_new_tokens=30, min_new_tokens=30, do_sample=False, past_key_values=cache)
    assert (len(set(cache.kv_lengths())) == 1) == keeps


def generated(tiny, monkeypatch, windows, inputs, **how):
    real = cache_states(tiny.model)
    monkeypatch.setattr(cache_module, "cache_states", lambda _: real if windows else Kept(*real[:2], {}))
    with torch.no_grad(), vr.applied(tiny.model, [Stride(0.5)]):
        return tiny.model.generate(**inputs, **TOLD, min_new_tokens=how["max_new_tokens"], **how)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "beams", "ahead"]
)
def test_generation_is_that_of_a_cache_that_keeps_all(how, monkeypatch):
    tiny = family("gemma3", dtype=torch.float64)
    rows = [Row(1, 6, 3)] if "prompt_lookup_num_tokens" in how else [Row(1, 6, 3), Row(1, 14, 4)]
    inputs = tiny.inputs(rows, side="left")
    got, kept = (generated(tiny, monkeypatch, w, inputs, max_new_tokens=30, **how) for w in (True, False))
    assert torch.equal(got.sequences, kept.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(kept.logits), atol=1e-9, rtol=1e-9)
    windows, held = cache_states(tiny.model).windows, got.past_key_values.kv_lengths()
    if "prompt_lookup_num_tokens" in how:
        assert held == kept.past_key_values.kv_lengths()
    else:
        assert all(held[i] <= n + 2 * LATE + 1 for i, n in windows.items())


@pytest.mark.slow
def test_a_turn_with_an_image_behind_what_was_let_go(monkeypatch):
    tiny = family("gemma3", dtype=torch.float64)
    logits = []
    for windows in (True, False):
        out = generated(
            tiny, monkeypatch, windows, tiny.inputs([Row(1, 6, 3), Row(1, 14, 4)], side="left"), max_new_tokens=20
        )
        turn = tiny.inputs([Row(1, 2, 3)] * 2, seed=3)
        mask = torch.cat([torch.ones_like(out.sequences[:, 1:]), turn["attention_mask"]], 1)
        with torch.no_grad(), vr.applied(tiny.model, [Stride(0.5)]):
            past = out.past_key_values
            logits.append(tiny.model(**turn | {"attention_mask": mask}, past_key_values=past).logits)
    torch.testing.assert_close(*logits, atol=1e-9, rtol=1e-9)
