"""Decode steps as graphs, which Inductor would get: in one graph, and in the cache's room."""

from __future__ import annotations

import itertools

import pytest
import torch

import vlmrewrite as vr
from tests.small import long, places
from vlmrewrite.capture import CAPTURES
from vlmrewrite.kvcache import layer
from vlmrewrite.kvcache.buffer import LEAST
from vlmrewrite.passes import STS, Stride
from vlmrewrite.testing.models import FAMILIES, Row


def steps(model, token, cache, n, mode=torch.no_grad):
    """Logits, and where the cache lay after each step."""
    logits, where = [], []
    for _ in range(n):
        with mode():
            logits.append(model(input_ids=token, past_key_values=cache).logits.detach())
        where.append(places(cache))
    return torch.cat(logits, 1), where


ROWS = [Row(1, 2, 3), Row(1, 3, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]][: 1 + long()], ids=len)
def test_compiled_decode_steps_write_in_place(as_they_are, rows, monkeypatch):
    """Through a buffer that is used up, a crop and a reordering, and in one graph."""
    monkeypatch.setattr(layer, "SMALL", 0)  # or eager steps copy
    tiny = FAMILIES["llava"](layers=3)
    inputs, token = tiny.inputs(rows, side="left"), torch.full((len(rows), 1), 9)
    beams = torch.arange(len(rows)).flip(0)
    results = []
    for backend in ("eager", "inductor"):
        with vr.applied(tiny.model, [STS(keep=6, refine=3, at=1)], backend=backend):
            with torch.no_grad():
                cache = tiny.model(**inputs).past_key_values
            first, where = steps(tiny.model, token, cache, LEAST + 3)
            assert [a == b for a, b in itertools.pairwise(where)].count(False) == 1  # the buffer was used up
            cache.crop(-3)
            with torch.no_grad():
                cache.reorder_cache(beams)
            held = places(cache)
            second, where = steps(tiny.model, token, cache, 3)
            assert where == [held] * 3
            assert cache.layers[1].positions is cache.layers[2].positions
            assert len(CAPTURES[tiny.model].text.graphs) == (backend == "inductor")
            third, where = steps(tiny.model, token, cache, 2, torch.inference_mode)
            assert where == [held] * 2
            results.append(torch.cat([first, second, third], 1))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_decode_steps_with_gradients_concatenate(as_they_are):
    tiny = FAMILIES["llava"](layers=2)
    inputs, token = tiny.inputs(ROWS[:1]), torch.tensor([[9]])
    grads = []
    for backend in ("eager", "inductor"):
        with vr.applied(tiny.model, [STS(keep=6, refine=3, at=1)], backend=backend):
            with torch.no_grad():
                cache = tiny.model(**inputs).past_key_values
            steps(tiny.model, token, cache, 2)
            before = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
            for _ in range(2):
                out = tiny.model(input_ids=token, past_key_values=cache).logits
            assert all(layer.buffer is None for layer in cache.layers)
            steps(tiny.model, token, cache, 2)
            assert all(torch.equal(x, y) for x, y in before)
            grads.append(torch.autograd.grad(out.sum(), next(tiny.model.model.language_model.layers.parameters()))[0])
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-5)


def test_a_turn_with_an_image_after_decoding_keeps_no_old_room(as_they_are):
    tiny = FAMILIES["llava"](layers=2)
    inputs, more = tiny.inputs([Row(1, 2, 3)]), tiny.inputs([Row(1, 1, 2)], seed=1)
    for backend in ("eager", "inductor"):
        with vr.applied(tiny.model, [STS(keep=6, refine=3, at=1)], backend=backend), torch.no_grad():
            cache = tiny.model(**inputs).past_key_values
            steps(tiny.model, torch.tensor([[9]]), cache, 2)
            tiny.model(input_ids=more["input_ids"], pixel_values=more["pixel_values"], past_key_values=cache)
            assert all(layer.buffer is None for layer in cache.layers)


@pytest.mark.slow
def test_steps_in_a_window_are_compiled_once(monkeypatch, seen):
    """Nothing is let go of between them, only behind the prompt."""
    monkeypatch.setattr(layer, "LATE", 3)
    tiny = FAMILIES["gemma3"](layers=2)
    tiny.model.requires_grad_(False)
    with torch.no_grad(), vr.applied(tiny.model, [Stride(0.5)], backend="inductor"):
        for before, lengths in ((3, 1), (60, 2)):
            how = {"max_new_tokens": 30, "min_new_tokens": 30, "return_dict_in_generate": True}
            out = tiny.model.generate(**tiny.inputs([Row(1, before, 3)]), **how)
            assert len(set(out.past_key_values.kv_lengths())) == lengths
            assert len(CAPTURES[tiny.model].text.graphs) == lengths
