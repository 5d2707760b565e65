"""`vr.evaluate` on families that generate in other ways: whatever is in front of the new tokens, each is scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from PIL import Image
from transformers import BatchFeature

import vlmrewrite as vr
from vlmrewrite.passes import Stride
from vlmrewrite.testing.models import ZOO, Row


class Processor:
    """Makes random prompts of a tiny model of texts, one text token for each of their letters and one more."""

    image_token, chat_template = "<image>", None

    def __init__(self, tiny: Any) -> None:
        self.tiny = tiny

    def __call__(self, images: Sequence[Any], text: Sequence[str], padding_side: str, **_: Any) -> BatchFeature:
        rows = [Row(len(own), before=1, after=len(t) - len("<image> ")) for own, t in zip(images, text, strict=True)]
        return BatchFeature(self.tiny.inputs(rows, side=padding_side))

    def batch_decode(self, ids: Sequence[Sequence[int]], skip_special_tokens: bool) -> list[str]:
        return [" ".join(map(str, row)) for row in ids]


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("family", ["blip_2", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.filterwarnings("ignore:3 samples. intervals are wide")
def test_keeping_all_changes_nothing(family: str) -> None:
    tiny, picture = ZOO[family](), Image.new("RGB", (16, 16))
    rows = [{"image": picture, "prompt": "what"[: 2 + i]} for i in range(3)]
    every, few = (vr.Recipe(name=str(keep), passes=(Stride(keep=keep),)) for keep in (1.0, 2))
    done = vr.evaluate(tiny.model, Processor(tiny), rows, [every, few], batch=2, max_new_tokens=3)
    assert not done.failures
    assert all(len(sample["output"].split()) == 3 for sample in done.samples)
    plain, same, less = done.rows
    assert (same.accuracy, same.changed, same.flops, same.kv) == (1, 0, 1, 1)
    assert same.agreement["kl"] < 1e-6 < less.agreement["kl"]
    assert less.flops is not None and less.flops < 1 and plain.accuracy == 1
