"""A folder as a user would have it: a tiny LLaVA with random weights, its processor, and a picture."""

from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlavaProcessor, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmrewrite.testing.models import FAMILIES, IMAGE, VOCABULARY

SPECIAL = {"<pad>": 0, "<unk>": 1, "<image>": IMAGE}
WORDS = {f"w{i}": i for i in range(VOCABULARY) if i not in SPECIAL.values()}


def words() -> PreTrainedTokenizerFast:
    """A tokenizer of the words of a tiny model."""
    made = Tokenizer(WordLevel(WORDS | SPECIAL, "<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def saved_llava(path: Path) -> Path:
    """Write a tiny LLaVA with weights and processor, and ``picture.png``, into a folder; returns the folder."""
    FAMILIES["llava"]().model.save_pretrained(path)
    pictures = CLIPImageProcessorPil(
        do_resize=False, size={"shortest_edge": 16}, do_center_crop=False, crop_size={"height": 16, "width": 16}
    )
    LlavaProcessor(
        image_processor=pictures,
        tokenizer=words(),
        patch_size=4,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,
    ).save_pretrained(path)
    noise = torch.randint(256, (16, 16, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(noise.numpy()).save(path / "picture.png")
    return path
