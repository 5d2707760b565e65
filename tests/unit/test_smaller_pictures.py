"""Smaller pictures by what a processor can be told, and as a control beside others."""

from __future__ import annotations

import re
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BatchFeature
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

import vlmrewrite as vr
from examples.digits.model import load
from examples.digits.scenes import held_out_questions
from vlmrewrite.evaluate import read_data
from vlmrewrite.hf import smaller
from vlmrewrite.passes import Downsample, Stride
from vlmrewrite.testing.models import ZOO
from vlmrewrite.testing.models.tiny import SPECIAL
from vlmrewrite.tune.pictures import smaller_pictures

pytestmark = pytest.mark.filterwarnings("ignore:.* samples. intervals are wide")


def numbers(images: Any, height: int, width: int) -> int:
    return int(images(images=[Image.new("RGB", (width, height))], return_tensors="pt")["pixel_values"].numel())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "least", "most"),
    [
        (Qwen2VLImageProcessorPil(), 0.4, 0.56),
        (PixtralImageProcessorPil(), 0.4, 0.56),
        (GotOcr2ImageProcessorPil(crop_to_patches=True), 0.2, 0.56),
        (SmolVLMImageProcessorPil(), 0.2, 0.56),
        (LlavaNextImageProcessorPil(), 0.4, 0.71),  # of ten tiles, the shapes that are there have seven at least
    ],
    ids=lambda x: type(x).__name__,
)
def test_half_of_the_tokens(images: Any, least: float, most: float) -> None:
    given = SimpleNamespace(image_processor=images)
    before = [numbers(images, *size) for size in ((600, 800), (1100, 900))]
    made = smaller(given, 0.5)
    assert given.image_processor is images
    assert [numbers(images, *size) for size in ((600, 800), (1100, 900))] == before
    after = [numbers(made.image_processor, *size) for size in ((600, 800), (1100, 900))]
    assert all(least <= b / a <= most for a, b in zip(before, after, strict=True)), (before, after)


@pytest.mark.parametrize("images", [CLIPImageProcessorPil(), Gemma3ImageProcessorPil()])
def test_a_fixed_number_of_tokens(images: Any) -> None:
    with pytest.raises(ValueError, match=f"^{type(images).__name__} makes as many tokens of a picture however small"):
        Downsample(keep=0.5).processor(SimpleNamespace(image_processor=images))


@pytest.mark.parametrize("share", [0.1, 0.37, 0.5, 0.8])
def test_what_the_processor_leaves_as_it_is_has_whole_patches(share: float) -> None:
    images = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    made = smaller(SimpleNamespace(image_processor=images, patch_size=14), share).image_processor
    [pixels] = made(images=[Image.new("RGB", (336, 448))], return_tensors="pt")["pixel_values"]
    assert not any(n % 14 for n in pixels.shape[1:])
    assert 0.75 * share < pixels.numel() / (3 * 336 * 448) < 1.25 * share


def test_no_picture_becomes_larger() -> None:
    images = CLIPImageProcessorPil(do_resize=False, do_center_crop=False)
    made = smaller(SimpleNamespace(image_processor=images, patch_size=14), 0.5).image_processor
    [pixels] = made(images=[Image.new("RGB", (100, 7))], return_tensors="pt")["pixel_values"]
    assert pixels.shape[1:] == (7, 70)


def test_no_pictures() -> None:
    with pytest.raises(ValueError, match="expected a processor with an image_processor, got SimpleNamespace"):
        smaller(SimpleNamespace(), 0.5)


class Processor:
    """Of a tiny model of pictures of any size: a token for 8 times 8 pixels, and one for each letter."""

    image_token, chat_template = "<image>", None

    def __init__(self, tiny: Any) -> None:
        self.image_processor: Any = Qwen2VLImageProcessorPil(
            patch_size=4, size={"shortest_edge": 64, "longest_edge": 10**6}
        )
        self.token, self.types = tiny.image_token_id, tiny.token_types

    def __call__(self, images: Sequence[Any], text: Sequence[str], **_: Any) -> BatchFeature:
        made = self.image_processor(images=[image for own in images for image in own], return_tensors="pt")
        counts = (made["image_grid_thw"].prod(1) // 4).tolist()
        rows = [[SPECIAL, *[self.token] * n, *[SPECIAL + 1] * len(t)] for n, t in zip(counts, text, strict=True)]
        ids = torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, rows)), True, 0, padding_side="left")
        types = {self.types: ids.eq(self.token).long()}
        return BatchFeature({"input_ids": ids, "attention_mask": ids.ne(0).long(), **types, **made})

    def batch_decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in ids]


@pytest.mark.slow
def test_beside_other_controls() -> None:
    tiny = ZOO["qwen2_vl"](layers=2)
    processor, rows = Processor(tiny), []
    for i in range(3):
        picture = Image.effect_noise((64, 48 + 16 * i), 90).convert("RGB")
        rows.append({"image": picture, "prompt": "what"})
    recipe = vr.Recipe(name="smaller", passes=(Downsample(keep=0.5),))
    even = vr.Recipe(name="even", passes=(Stride(keep=0.5),))
    done = vr.evaluate(tiny.model, processor, rows, [recipe, even], batch=3, max_new_tokens=2)
    assert not done.failures
    flops, kv = zip(*((row.flops, row.kv) for row in done.rows), strict=True)
    assert 0.4 < flops[1] < 0.7
    assert abs(flops[1] - flops[2]) < 0.15
    assert kv[1] < 0.7
    assert not any(row.refused for row in done.rows)
    assert done.rows[1].agreement["kl"] > 1e-4
    found, cost = smaller_pictures(Downsample, tiny.model, processor, read_data(rows), "flops", 0.5)
    assert 0.3 < cost["flops"] <= 0.5
    assert found.processor(processor) is not processor


def test_a_model_that_takes_one_size() -> None:
    model, processor = load()
    rows = [{"image": r.image, "prompt": r.question, "answer": r.answer} for r in held_out_questions(2)]
    recipe = vr.Recipe(name="smaller", passes=(Downsample(keep=0.5),))
    with pytest.raises(ValueError, match=r"smaller: LlavaFor\w+ does not take smaller pictures: .*doesn't match model"):
        vr.evaluate(model, processor, rows, recipe)
    said = re.escape("recipe 'smaller' makes pictures smaller by way of the processor, which apply does not see")
    with pytest.warns(UserWarning, match=said):
        vr.apply(model, recipe)
    vr.restore(model)
