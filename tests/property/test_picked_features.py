"""Forwards that write some of the vision tower's features into the stream, and leave out the others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pad_sequence

import vlmrewrite as vr
from tests.small import crossed
from vlmrewrite.hf.frames import frame_sizes, left_of
from vlmrewrite.hf.vision import EncoderOutput
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, FastV, FrameStride, Stride, VidCom2
from vlmrewrite.report.picture import kept_picture
from vlmrewrite.runtime.session import session_of
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import PAD, ZOO, Row

MIXED = [Row(0, 2, 2, videos=2), Row(2, 1, 3, videos=1), Row(0, 4, 1)]

RECIPES = {
    "sts": [STS(keep=5, refine=3, at=1)],
    "encoder": [STS(keep=4, refine=2, at=1, features="encoder")],
    "fastv": [FastV(keep=0.5, at=1)],
    "frames": [FrameStride(keep=4), Stride(2, at=1, per="frame")],
    "vidcom2": [VidCom2(keep=0.5)],
    "visor": [VISOR([0], [2])],
    "dpvr": [DPVR()],
}

PICKS = {
    "mask": lambda x, keep: x[keep],
    "mask of rows": lambda x, keep: x[keep, :],
    "numbers": lambda x, keep: x[keep.nonzero()[:, 0]],
    "index_select": lambda x, keep: x.index_select(0, keep.nonzero().flatten()),
    "twice": lambda x, keep: x[order := _order(keep)][order.argsort()][keep],
    "channels first": lambda x, keep: x[:, _order(x[0])].index_select(-1, _order(x[0]).argsort())[keep],
}

OTHERS = {
    "backwards": (lambda x, keep: x[keep.nonzero().flatten().flip(0)], "in another order, or some of them several"),
    "one more": (
        lambda x, keep: torch.cat([x[:1], x])[torch.cat([keep[:1], keep])],
        "some of .* where the vision tower",
    ),
    "pooled": (lambda x, keep: x.unflatten(0, (-1, 2)).mean(1).repeat(2, 1)[:-1][keep[:-1]], "where the vision tower"),
}
"""What is no choice among the features as they were made, with what is said of it."""


def _order(x):
    """An order of the rows of a tensor."""
    return torch.arange(len(x)).roll(3).flip(0)


def picking(family, how):
    """A tiny model whose forward takes those features that ``keep`` says; such inputs, and what they say."""
    tiny = ZOO[family](layers=3)
    base = type(tiny.model.model)

    def forward(self, *args, keep=None, pixel_values=None, mm_encoder_outputs=None, **kwargs):
        if pixel_values is not None:
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values)}
        if mm_encoder_outputs is not None:
            features = mm_encoder_outputs["image"].pooler_output
            one = isinstance(features, torch.Tensor)
            features = PICKS[how](features.flatten(0, -2) if one else torch.cat(list(features)), keep)
            mm_encoder_outputs = {"image": EncoderOutput({"pooler_output": features if one else [features]})}
        return base.forward(self, *args, mm_encoder_outputs=mm_encoder_outputs, **kwargs)

    tiny.model.model.__class__ = type(base.__name__, (base,), {"forward": forward})
    inputs = tiny.inputs([Row(1, 3, 2), Row(2, 1, 3), Row(0, 4, 1)])
    ids, generator = inputs["input_ids"], torch.Generator().manual_seed(3)
    image = ids == tiny.image_token_id
    keep = torch.rand(int(image.sum()), generator=generator) < 0.6
    there = inputs["attention_mask"].bool().masked_scatter(image, keep)
    for name in inputs.keys() & {"input_ids", "attention_mask", "mm_token_type_ids"}:
        rows = [x[own] for x, own in zip(inputs[name], there, strict=True)]
        inputs[name] = pad_sequence(rows, True, PAD, padding_side="left")
    return tiny, inputs | {"keep": keep}, keep


@pytest.mark.parametrize(("family", "how"), crossed(["llava", "internvl", "vipllava"], PICKS))
def test_some_features_are_taken(family, how):
    tiny, inputs, keep = picking(family, how)
    recipes = ["sts", "encoder", "fastv", "visor"] if family == "llava" else ["sts", "fastv"]
    for recipe in recipes:
        forward_agreement(tiny.model, inputs, RECIPES[recipe]).check()
    call = vr.trace(tiny.model, inputs).call
    assert call.picked and len(call.flat) == int(keep.sum()) < len(keep)
    encoded = tiny.model.model.get_image_features(inputs["pixel_values"]).pooler_output
    assert call.feature_lengths == [int(own.sum()) for own in keep.split([len(x) for x in encoded])]
    if family == "llava":
        taken = []
        tiny.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
        tiny.model.model.get_image_features(inputs["pixel_values"])
        assert torch.equal(call.encoder_features, taken[0].flatten(0, 1)[keep])


def test_all_that_are_taken_are_as_if_none_were_chosen():
    tiny, inputs, keep = picking("llava", "mask")
    whole = tiny.inputs([Row(1, 3, 2), Row(0, 4, 1)])
    whole["keep"] = torch.ones(int((whole["input_ids"] == tiny.image_token_id).sum()), dtype=torch.bool)
    forward_agreement(tiny.model, whole, DAPE(budget=0.6)).check()  # the grid is there
    with pytest.raises(ValueError, match="leaves out some of the vision tower's features, so that those left form no"):
        forward_agreement(tiny.model, inputs, DAPE(budget=0.6))
    with vr.applied(tiny.model, [Stride(0.5)]):
        tiny.model(**inputs)
        picture = kept_picture(tiny.model, session_of(tiny.model).last())
    assert picture.unknown is not None and sum(map(sum, picture.sizes)) == int(keep.sum())


@pytest.mark.parametrize("how", OTHERS)
def test_what_is_no_choice_is_an_error(monkeypatch, how):
    pick, said = OTHERS[how]
    monkeypatch.setitem(PICKS, how, pick)
    tiny, inputs, _ = picking("llava", how)
    with pytest.raises(ValueError, match=said):
        forward_agreement(tiny.model, inputs, Stride(0.5))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "encoder"])
def test_videos_with_images_beside_them(recipe):
    tiny = ZOO["video_llama_3"](layers=3)
    inputs = tiny.inputs(MIXED, seed=5)
    forward_agreement(tiny.model, inputs, RECIPES[recipe]).check()
    generation_agreement(tiny.model, inputs, RECIPES[recipe], new_tokens=3).check()


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 3)), min_size=1, max_size=5), st.data())
def test_frames_are_counted(images, data):
    lengths, frames = [n for n, _ in images], [many for _, many in images]
    sizes = frame_sizes(lengths, frames)
    assert [*map(sum, sizes)] == lengths and [*map(len, sizes)] == frames
    assert all(tuple(sorted(image)) == image for image in sizes), "what is left over is the last one's"
    assert frame_sizes(lengths, frames[1:]) == [(n,) for n in lengths]
    keep = [data.draw(st.booleans()) for _ in range(sum(lengths))]
    told, at = [], iter(keep)
    for image in sizes:
        left = tuple(sum(next(at) for _ in range(n)) for n in image)
        told += [left] if any(left) else []
    assert left_of(sizes, torch.tensor(keep, dtype=torch.bool).nonzero()[:, 0]) == told
