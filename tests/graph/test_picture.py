"""The picture of kept tokens: images, and videos as strips of frames."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
import torch

import vlmrewrite as vr
from tests.small import family
from vlmrewrite.passes import VISOR, Stride
from vlmrewrite.plan import Frame, Text
from vlmrewrite.plan.pipeline import frozen_pass
from vlmrewrite.report.picture import KeptTokens
from vlmrewrite.testing.models import ZOO, Row

SVG = "{http://www.w3.org/2000/svg}"


@frozen_pass
class FirstFrame:
    """From layer 1 on, the first frame of each video."""

    name = "first"

    def refuse(self, plan):
        """Never."""

    def change(self, plan):
        for layer in plan.layers[1:]:
            layer.run_on(Text | Frame(0))


def drawn(picture):
    """Lines of text, and of each frame what it says, and how many cells of 96 pixels squared are dark and light."""
    root = ElementTree.fromstring(picture)
    frames = []
    for group in root.iter(f"{SVG}g"):
        light, dark = (path.get("d") for path in group.findall(f"{SVG}path"))
        frames.append((group.find(f"{SVG}title").text, dark.count("M"), light.count("M")))
    return [text.text for text in root.iter(f"{SVG}text")], frames


@pytest.mark.slow
@torch.no_grad()
def test_a_video_is_a_strip_of_frames():
    tiny = family("qwen2_5_vl", layers=3)
    inputs = tiny.inputs([Row(1, 3, 2), Row(0, 2, 3, videos=1)], seed=3)
    t, h, w = inputs["video_grid_thw"][0].tolist()
    n = h * w // 4
    with vr.applied(tiny.model, [FirstFrame()]):
        tiny.model(**inputs)
        report = vr.report(tiny.model)
    texts, frames = drawn(report.picture())
    image = int(inputs["image_grid_thw"].prod()) // 4
    assert texts[1:4] == [f"layer 0, All: {image + t * n} of {image + t * n} vision tokens", "row 0, image 0",
                          f"row 1, video 0, {t} frames"]  # fmt: skip
    assert texts[4].startswith("layers 1-2, ")
    assert texts[4].endswith(f": {n} of {image + t * n} vision tokens")
    whole = [(f"frame {i}: {n} of {n} tokens", n, 0) for i in range(t)]
    assert frames[: 1 + t] == [(f"frame 0: {image} of {image} tokens", image, 0), *whole]
    later = [(f"frame {i}: 0 of {n} tokens", 0, n) for i in range(1, t)]
    assert frames[1 + t :] == [(f"frame 0: 0 of {image} tokens", 0, image), whole[0], *later]
    assert report.picture() in report._repr_html_()


@pytest.mark.slow
@torch.no_grad()
def test_where_tokens_lie_is_drawn_as_it_is():
    tiny = family("qwen2_5_vl", layers=3)
    inputs = tiny.inputs([Row(0, 2, 3, videos=1)], seed=3)
    t, h, w = inputs["video_grid_thw"][0].tolist()
    with vr.applied(tiny.model, [Stride(0.5, per="frame")]):
        tiny.model(**inputs)
        (stage,), picture = vr.kept_tokens(tiny.model), vr.report(tiny.model).picture()
    kept = stage.vision[inputs["input_ids"] == tiny.video_token_id].reshape(t, h // 2, w // 2)
    assert 0 < int(kept.sum()) < kept.numel()
    cell = 96 // max(h // 2, w // 2)
    for frame, group in zip(kept, ElementTree.fromstring(picture).iter(f"{SVG}g"), strict=True):
        _, dark = (path.get("d") for path in group.findall(f"{SVG}path"))
        corners = [(int(y) // cell, int(x) // cell) for x, y in re.findall(r"M(\d+) (\d+)", dark)]
        assert corners == [tuple(at) for at in frame.nonzero().tolist()]


@pytest.mark.slow
@torch.no_grad()
def test_what_is_not_known_is_said():
    tiny = ZOO["video_llava"](layers=3)
    with vr.applied(tiny.model, [Stride(0.5), VISOR([0], [2])]):
        with pytest.raises(ValueError, match="no call with an image was made"):
            vr.report(tiny.model).picture()
        tiny.model(**tiny.inputs([Row(1, 3, 2, videos=1)]))
        texts, _ = drawn(vr.report(tiny.model).picture())
    assert texts[-1].startswith("tokens in order, not where they lie: of a video, an image has 5 tokens")


def test_a_large_batch_and_long_strips():
    sizes = [(4,) * 30] * 10
    shown = KeptTokens(
        tuple(f"row {i}, video 0" for i in range(10)),
        tuple(((2, 2),) * 30 for _ in sizes),
        (("layers 0-3, Text", bytes([1, 0, 0, 1] * 300)),),
        None,
        tuple(sizes),
    )
    texts, frames = drawn(shown.svg())
    assert texts[-1] == "2 more images or videos, of rows from 8 on"
    assert frames == [(f"frame {i}: 2 of 4 tokens", 2, 2) for _ in range(8) for i in range(30)]
    moves = [re.findall(r"\d+", g.get("transform")) for g in ElementTree.fromstring(shown.svg()).iter(f"{SVG}g")]
    assert max(int(x) for x, _ in moves) <= 960 - 96
    assert len(set(map(tuple, moves))) == len(moves)
