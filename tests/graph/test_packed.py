"""Packed sequences: refused with images, as unmodified without; what only looks like them is not refused."""

from __future__ import annotations

import pytest
import torch

import vlmrewrite as vr
from tests.small import family
from vlmrewrite.passes import Stride
from vlmrewrite.testing.models import Row

SOME, EVERYTHING = [Stride(keep=4, at=1)], [Stride(keep=1_000_000, at=1)]


def packed(length: int, at: int) -> torch.Tensor:
    return torch.cat([torch.arange(at), torch.arange(length - at)])[None]


@pytest.fixture(scope="module")
def qwen():
    return family("qwen2_5_vl")


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_packed_sequences_with_images_are_refused(llava):
    inputs = llava.inputs([Row(1, 2, 6)])
    n = inputs["input_ids"].shape[1]
    del inputs["attention_mask"]
    for positions, message in (
        (packed(n, n - 3), rf"go from {n - 4} to 0 at token {n - 3} of row 0.*packed"),
        (packed(n, 1), "go from 0 to 0 at token 1 of row 0"),
        (torch.arange(n)[None] * 2, "go from 0 to 2 at token 1"),
    ):
        with vr.applied(llava.model, SOME), pytest.raises(ValueError, match=message):
            llava.model(**inputs, position_ids=positions, use_cache=False)
        with pytest.raises(ValueError, match=message):
            vr.trace(llava.model, {**inputs, "position_ids": positions, "use_cache": False})


@pytest.mark.slow
def test_packed_multimodal_rope_is_refused(qwen):
    inputs = qwen.inputs([Row(1, 2, 6)])
    n = inputs["input_ids"].shape[1]
    del inputs["attention_mask"]
    rope = torch.arange(n).expand(3, 1, -1)
    four = torch.cat([packed(n, 4)[None], rope])
    with vr.applied(qwen.model, SOME), torch.no_grad():
        with pytest.raises(ValueError, match="go from 3 to 0 at token 4 of row 0"):
            qwen.model(**inputs, position_ids=four, use_cache=False)
        for fine in (rope, torch.cat([torch.arange(n).expand(1, 1, -1), rope * 3 % 5]), rope % 4):
            qwen.model(**inputs, position_ids=fine, use_cache=False)


@pytest.mark.slow
def test_what_transformers_does_not_take_for_packed_is_not_refused(llava):
    """With a cache or a mask it masks nothing; so the logits are the unmodified model's."""
    inputs = llava.inputs([Row(1, 2, 6)])
    positions = packed(inputs["input_ids"].shape[1], 5)
    mask = inputs.pop("attention_mask")
    with torch.no_grad():
        for more in ({"use_cache": True}, {"use_cache": False, "attention_mask": mask}):
            expected = llava.model(**inputs, position_ids=positions, **more).logits
            with vr.applied(llava.model, EVERYTHING):
                close(llava.model(**inputs, position_ids=positions, **more).logits, expected)


@pytest.mark.slow
def test_left_padding_is_not_refused(llava):
    inputs = llava.inputs([Row(1, 2, 6), Row(1, 2, 1)], side="left")
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with vr.applied(llava.model, SOME), torch.no_grad():
        for at in (positions, positions.masked_fill(inputs["attention_mask"] == 0, 1)):
            llava.model(**inputs, position_ids=at, use_cache=False)
        llava.model.generate(**inputs, max_new_tokens=2, use_cache=False)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_text_without_a_cache_is_masked_as_in_the_unmodified_model(llava, qwen, name):
    tiny = {"llava": llava, "qwen2_5_vl": qwen}[name]
    inputs = tiny.inputs([Row(0, 5, 6)])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = packed(11, 5)
    if name == "qwen2_5_vl":
        positions = positions.expand(4, 1, -1)
    with torch.no_grad():
        apart = tiny.model(input_ids=ids, position_ids=positions, use_cache=False).logits
        across = tiny.model(input_ids=ids, position_ids=positions, use_cache=False, attention_mask=mask).logits
        assert not torch.allclose(apart, across, atol=1e-2)
        with vr.applied(tiny.model, SOME):
            close(tiny.model(input_ids=ids, position_ids=positions, use_cache=False).logits, apart)
            close(
                tiny.model(input_ids=ids, position_ids=positions, use_cache=False, attention_mask=mask).logits, across
            )
