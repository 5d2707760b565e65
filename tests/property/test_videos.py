"""Videos: what policies see of their frames, budgets by frame, video and row, and numbers against the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vlmrewrite as vr
from tests.small import crossed, family
from vlmrewrite.ops import shared_out
from vlmrewrite.passes import DAPE, DPVR, STS, VISOR, VTW, DivPrune, FastV, FrameStride, Random, Stride, VidCom2
from vlmrewrite.passes.framestride import framestride_sample
from vlmrewrite.passes.vidcom2 import vidcom2_sample
from vlmrewrite.plan import PER, Frame, Images, Policy, Text, Video, Videos
from vlmrewrite.plan.pipeline import frozen_pass
from vlmrewrite.testing.agreement import forward_agreement, generation_agreement
from vlmrewrite.testing.models import ZOO, Row

VIDEO = [Row(0, 3, 2, videos=1), Row(0, 1, 3, videos=2)]
MIXED = [Row(1, 3, 2, videos=1), Row(2, 1, 3), Row(0, 2, 2, videos=1), Row(0, 5, 2)]
ROWS = {"videos": VIDEO, "mixed": MIXED}
RECIPES = {
    "stride": [Stride(0.5, per="frame")],
    "random": [Random(3, at=1, per="row")],
    "sts": [STS(keep=5, refine=3, at=1)],
    "fastv": [FastV(keep=0.5, at=1, per="frame")],
    "divprune": [DivPrune(keep=4, per="row")],
    "framestride": [FrameStride(keep=5), FastV(keep=0.4, at=1, per="row")],
    "vidcom2": [VidCom2(keep=0.5), Stride(1, at=2, per="frame")],
    "dpvr": [DPVR()],
    "visor": [VISOR([0], [2])],
    "vtw": [VTW(at=1)],
    "dape": [DAPE(budget=0.6)],
}


@pytest.mark.parametrize(("rows", "recipe"), crossed(["mixed", "videos"], RECIPES))
def test_forward_agrees_with_the_oracle(rows, recipe):
    tiny = family("qwen2_5_vl", layers=3)
    forward_agreement(tiny.model, tiny.inputs(ROWS[rows], side="left", seed=1), RECIPES[recipe]).check()


@pytest.mark.parametrize(("rows", "recipe"), crossed(["mixed", "videos"], ["framestride", "vidcom2", "dape", "visor"]))
def test_generation_agrees_with_the_oracle(rows, recipe):
    tiny = family("qwen2_5_vl", layers=3)
    generation_agreement(tiny.model, tiny.inputs(ROWS[rows], seed=2), RECIPES[recipe], new_tokens=3).check()


@pytest.mark.slow
def test_videos_that_the_forward_gives_to_the_encoder_of_images():
    tiny = ZOO["perception_lm"](layers=3)
    for rows in (MIXED, VIDEO):
        inputs = tiny.inputs(rows, seed=3)
        forward_agreement(tiny.model, inputs, FastV(keep=0.5, at=1)).check()
        generation_agreement(tiny.model, inputs, RECIPES["visor"], new_tokens=3).check()


@frozen_pass
class Sets:
    """From layer 1 on: images, the first frame of each video, and of the second video one token a frame."""

    name = "sets"

    def refuse(self, plan):
        """Never."""

    def change(self, plan):
        stride = Policy("stride", torch.ops.vlm.stride_sample.default)
        kept = Text | Images | Frame(0) | (Video(1) & Videos).select(stride, 1, at=1, per="frame")
        for entry in plan.layers[1:]:
            entry.run_on(kept)


def test_words_for_images_videos_and_frames():
    tiny = family("qwen2_5_vl", layers=3)
    inputs = tiny.inputs([Row(1, 2, 2, videos=2), Row(1, 1, 4)], seed=3)
    forward_agreement(tiny.model, inputs, [Sets()]).check()
    with vr.applied(tiny.model, [Sets()]):
        tiny.model(**inputs)
        *_, last = vr.kept_tokens(tiny.model)
        videos = inputs["video_grid_thw"]
        per_frame = (videos[:, 1] * videos[:, 2] // 4).tolist()
        images = int((inputs["input_ids"] == tiny.image_token_id).sum())
        assert int(last.vision.sum()) == images + per_frame[0] + per_frame[1] + int(videos[1, 0]) - 1


def test_encoder_features_of_a_tower_without_a_projector_are_missing():
    tiny = family("qwen2_5_vl", layers=3)
    inputs = tiny.inputs(MIXED, seed=4)
    program = vr.trace(tiny.model, inputs)
    assert program.call.encoder_features is None
    assert (
        "visual takes 120 vectors of shape (120, 96) for 30 vision tokens" in program.plan.refusals["encoder_features"]
    )


def test_a_call_tells_its_videos():
    tiny = family("qwen2_5_vl", layers=3)
    text = str(vr.trace(tiny.model, tiny.inputs(MIXED)))
    assert "4 rows of" in text
    assert "3 images, 2 videos," in text


# ---- operators


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 9)), min_size=1, max_size=6), st.floats(0, 1), st.booleans())
def test_a_total_is_shared_out_exactly(given_parts, share, equal):
    weights, room = torch.tensor([w for w, _ in given_parts]), torch.tensor([r for _, r in given_parts])
    weights = torch.ones_like(weights) if equal else weights + 0.01
    total = round(share * int(room.sum()))
    parts = shared_out(weights, room, total)
    assert int(parts.sum()) == total
    assert bool((parts >= 0).all() and (parts <= room).all())
    if equal:
        free = parts[parts < room]
        assert len(free) == 0 or int(parts.max()) - int(free.min()) <= 1


@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.data())
def test_framestride_takes_as_many_of_each_frame_evenly(frames, data):
    n = sum(frames)
    k = data.draw(st.integers(1, n))
    frame = torch.arange(len(frames)).repeat_interleave(torch.tensor(frames))
    chosen = framestride_sample(frame, torch.ones(n, dtype=torch.bool), torch.tensor([n]), torch.tensor([k]))
    parts = shared_out(torch.ones(len(frames)), torch.tensor(frames), k).tolist()
    for piece, size, part in zip(chosen.split(frames), frames, parts, strict=True):
        assert piece.nonzero()[:, 0].tolist() == [i * size // part for i in range(part)]


def test_vidcom2_by_hand():
    """Frames 0 and 1 are alike and frame 2 is not, so that it keeps more."""
    x = torch.tensor([[1.0, 0.0]] * 4 + [[0.9, 0.1]] * 4 + [[0.0, 1.0]] * 3 + [[1.0, 0.05]])
    frame = torch.arange(3).repeat_interleave(4)
    every = torch.ones(12, dtype=torch.bool)
    chosen = vidcom2_sample(x, frame, every, torch.tensor([12]), torch.tensor([5]))
    assert int(chosen.sum()) == 5
    assert chosen.view(3, 4).sum(1).tolist() == [1, 1, 3]
    means = torch.stack([x[frame == i].mean(0) for i in range(3)])
    apart = -torch.nn.functional.cosine_similarity(x, x.mean(0, keepdim=True))
    unique = torch.stack([apart[frame == i].mean() for i in range(3)])
    parts = shared_out(4 * (1 + (unique / 0.01).softmax(0) - 1 / 3), torch.tensor([4, 4, 4]), 5).tolist()
    score = apart - torch.nn.functional.cosine_similarity(x, means[frame])
    best = [i * 4 + j for i in range(3) for j in score[frame == i].argsort(descending=True, stable=True)[: parts[i]]]
    assert chosen.nonzero()[:, 0].tolist() == sorted(map(int, best))


@pytest.mark.parametrize("per", PER)
def test_a_budget_is_of_what_it_says(per):
    tiny = family("qwen2_5_vl", layers=3)
    inputs = tiny.inputs(MIXED, seed=5)
    with vr.applied(tiny.model, [Stride(2, per=per)]):
        tiny.model(**inputs)
        ((stage),) = vr.kept_tokens(tiny.model)
        frames = inputs["video_grid_thw"][:, 0].tolist()
        expected = {"frame": [2 + 2 * frames[0], 4, 2 * frames[1], 0], "image": [4, 4, 2, 0], "row": [2, 2, 2, 0]}
        assert stage.vision.sum(1).tolist() == expected[per]
