"""Decode steps that a compiler cannot run, or not on a static cache: what is done instead, and what is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import StaticCache

import vlmrewrite as vr
from tests.small import family
from vlmrewrite.errors import CaptureError
from vlmrewrite.passes import STS, Stride
from vlmrewrite.runtime import text
from vlmrewrite.testing.models import FAMILIES, Row

ONE, TWO = [Row(1, 2, 3)], [Row(1, 2, 3), Row(2, 1, 4)]
SOME = [STS(keep=6, refine=3, at=1)]
TOLD = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}


@pytest.mark.slow
def test_a_forward_that_asks_for_the_length_is_compiled_as_without_a_static_cache(as_they_are, seen, monkeypatch):
    tiny = FAMILIES["llava"](layers=2)
    tiny.model.requires_grad_(False)
    own = type(tiny.model.model.language_model).forward

    def forward(self, *args, past_key_values=None, **kwargs):
        if past_key_values.get_seq_length() > 1000:
            raise ValueError("too long")
        return own(self, *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(type(tiny.model.model.language_model), "forward", forward)
    inputs = tiny.inputs(ONE)
    with torch.no_grad(), vr.applied(tiny.model, SOME, backend="inductor"):
        with pytest.warns(UserWarning, match="are compiled for keys that grow, not for the length of the static cache"):
            got = tiny.model.generate(**inputs, **TOLD, max_new_tokens=4, cache_implementation="static")
        assert len(seen) == 3
        assert "are compiled for keys that grow" in " ".join(str(vr.report(tiny.model)).split())
    with torch.no_grad(), vr.applied(tiny.model, SOME):
        expected = tiny.model.generate(**inputs, **TOLD, max_new_tokens=4)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "inductor"])
def test_a_decode_step_that_cannot_be_captured(as_they_are, seen, monkeypatch, backend):
    """Chosen by "auto", the compiler is left out, which is said; asked for, it is an error."""
    tiny = FAMILIES["llava"](layers=2)
    tiny.model.requires_grad_(False)
    own = type(tiny.model.model.language_model).forward

    def forward(self, *args, **kwargs):
        if kwargs["inputs_embeds"].shape[1] == 1 and kwargs["inputs_embeds"].isnan().any():
            raise ValueError("not a number")
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(tiny.model.model.language_model), "forward", forward)
    monkeypatch.setattr(text, "resolve", lambda *_: "inductor")
    inputs, how = tiny.inputs(ONE), TOLD | {"max_new_tokens": 4}
    with torch.no_grad(), vr.applied(tiny.model, SOME), monkeypatch.context() as patch:
        patch.setattr(text, "resolve", lambda *_: "eager")
        expected = tiny.model.generate(**inputs, **how)
    with torch.no_grad(), vr.applied(tiny.model, SOME, backend=backend):
        if backend == "inductor":
            with pytest.raises(CaptureError, match="branches on a tensor's value"):
                tiny.model.generate(**inputs, **how)
            return
        with pytest.warns(
            UserWarning, match="^decode steps of .* run without the compiler: .*branches on a tensor"
        ) as told:
            got = tiny.model.generate(**inputs, **how)
        assert len(told) == 1 and not seen
        assert torch.equal(got.sequences, expected.sequences)
        assert "run without the compiler" in " ".join(str(vr.report(tiny.model)).split())


@pytest.mark.slow
def test_what_one_call_cannot_is_not_said_of_others(seen, monkeypatch):
    """A call that is wrong in any way raises its own error; one without positions is another form of call."""
    tiny = family("qwen2_5_vl", dtype=torch.float64)
    inputs, token = tiny.inputs(ONE), torch.tensor([[9]])
    monkeypatch.setattr(text, "resolve", lambda *_: "inductor")
    n = inputs["input_ids"].shape[1]
    with torch.no_grad(), vr.applied(tiny.model, [Stride(0.5)]):

        def prompt():
            cache = StaticCache(tiny.model.config.get_text_config(), n + 9)
            tiny.model(**inputs, past_key_values=cache)
            return cache

        def step(cache, **more):
            before = len(seen)
            tiny.model(input_ids=token, past_key_values=cache, **more)
            return len(seen) - before, cache._fixed is not None

        at = torch.full((4, 1, 1), n)
        assert step(prompt(), position_ids=at) == (1, True)
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            step(prompt(), position_ids=at.repeat(1, 1, 5))
        assert step(cache := prompt(), position_ids=at) == (1, True)
        with pytest.warns(UserWarning, match="keys that grow"):
            assert step(cache) == (1, False)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert step(cache) == (1, False)
        assert step(cache, position_ids=at) == (1, True)


def test_a_mask_that_is_too_short_is_the_same_error(llava, seen):
    inputs, step = llava.inputs(TWO, side="left"), torch.tensor([[9], [8]])
    with torch.no_grad(), vr.applied(llava.model, SOME, backend="inductor"):
        cache = StaticCache(llava.model.config.get_text_config(), inputs["input_ids"].shape[1] + 3)
        llava.model(**inputs, past_key_values=cache)
        with pytest.raises(RuntimeError, match="index|size"):
            llava.model(input_ids=step, attention_mask=inputs["attention_mask"], past_key_values=cache)


def test_steps_under_autocast_behind_a_prompt_without(llava, seen):
    inputs, results = llava.inputs(ONE), []
    for backend in ("eager", "inductor"):
        with torch.no_grad(), vr.applied(llava.model, SOME, backend=backend):
            cache = StaticCache(llava.model.config.get_text_config(), inputs["input_ids"].shape[1] + 3)
            llava.model(**inputs, past_key_values=cache)
            with torch.autocast("cpu", torch.bfloat16):
                results += [llava.model(input_ids=torch.tensor([[9]]), past_key_values=cache).logits for _ in range(2)]
            assert cache.layers[0].keys.dtype is torch.float32
    assert len(seen) == 2
    for got, expected in zip(results[2:], results[:2], strict=True):
        torch.testing.assert_close(got, expected, atol=3e-2, rtol=3e-2)
