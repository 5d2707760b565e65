"""Folders with tiny models whose pictures differ in their tokens: random weights, a processor, and a picture."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from saved_llava import words
from transformers import LlavaNextProcessor, LlavaProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

from vlmrewrite.testing.models import ZOO

TEMPLATE = (
    "{% for m in messages %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image> {% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)


def saved_any_size(path: Path, *, chats: bool = False) -> Path:
    """A model that takes pictures of any size up to 64 by 64, with a token for 4 by 4 pixels; returns the folder.

    Args:
        path: where it is written, and ``picture.png`` of 32 by 32 pixels, which has 64 tokens.
        chats: whether its processor has a chat template.
    """
    pictures = PixtralImageProcessorPil(size={"longest_edge": 64}, patch_size={"height": 4, "width": 4})
    return _saved(path, "llava_pixtral", LlavaProcessor, pictures, chats)


def saved_tiles(path: Path) -> Path:
    """A model that cuts pictures into tiles of 8 by 8 pixels, and sees a smaller one of the whole; as above."""
    points = [[8, 8], [8, 16], [16, 8], [16, 16]]
    size = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    return _saved(
        path, "llava_next", LlavaNextProcessor, LlavaNextImageProcessorPil(image_grid_pinpoints=points, **size)
    )


def _saved(path: Path, name: str, kind: Any, pictures: Any, chats: bool = False) -> Path:
    tiny = ZOO[name]()
    if name == "llava_next":
        tiny.model.config.image_grid_pinpoints = pictures.image_grid_pinpoints
    tiny.model.save_pretrained(path)
    strategy = tiny.model.config.vision_feature_select_strategy
    options = {"patch_size": 4, "vision_feature_select_strategy": strategy, "image_token": "<image>"}
    more = {"num_additional_image_tokens": int(strategy == "default"), "chat_template": TEMPLATE if chats else None}
    kind(image_processor=pictures, tokenizer=words(), **options, **more).save_pretrained(path)
    noise = torch.randint(256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path / "picture.png")
    return path
