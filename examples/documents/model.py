"""The model that reads: an unmodified Hugging Face LLaVA, and its processor.

DINOv2 tower (4 layers x 128, patch 14: 576 tokens of a page of 336x336, fewer of smaller ones) -> projector -> Llama
(6 layers x 128, tied embeddings). A prompt is "<image> " and four words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from .pages import CANVAS, GRID, MEAN, PATCH, STD, VISION_TOKENS, HeldOut
from .questions import BOS, EOS, IMAGE, PAD, VOCABULARY

WIDTH, HEADS, MLP = 128, 4, 384
TOWER_LAYERS, DECODER_LAYERS = 4, 6
INIT_STD, QUERY_KEY_STD = 0.05, 0.08
CHECKPOINT = Path(__file__).parent / "checkpoint"


def build_model() -> LlavaForConditionalGeneration:
    """A freshly initialised model; queries and keys start alike, and the tower's positions as waves of both axes."""
    vision = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=HEADS,
        mlp_ratio=MLP // WIDTH,
        image_size=CANVAS,
        patch_size=PATCH,
        initializer_range=INIT_STD,
        layerscale_value=1.0,
        use_mask_token=False,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=DECODER_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=1024,
        initializer_range=INIT_STD,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=VISION_TOKENS,
        tie_word_embeddings=True,
    )
    model: Any = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            layer.self_attn.q_proj.weight.mul_(QUERY_KEY_STD / INIT_STD)
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
        tower = model.model.vision_tower
        tower.embeddings.position_embeddings[0, 1:] = waves()
        tower.embeddings.position_embeddings[0, 0] = 0
        for name, weight in tower.named_parameters():
            if name.endswith(("query.weight", "q_proj.weight")):
                weight.mul_(QUERY_KEY_STD / INIT_STD)
                twin = name.replace("query", "key").replace("q_proj", "k_proj")
                tower.get_parameter(twin).copy_(weight)
    settings = model.generation_config
    settings.bos_token_id, settings.eos_token_id, settings.pad_token_id = BOS, EOS, PAD
    settings.do_sample = False
    return model


def waves() -> torch.Tensor:
    """Sines and cosines of row and column, [576, 128]."""
    rates = 1.5 * 0.8 ** torch.arange(WIDTH // 4) * math.pi / 3
    angles = torch.arange(GRID)[:, None] * rates
    one = 0.5 * torch.cat([angles.sin(), angles.cos()], 1)  # [24, 64]
    return torch.cat([one[:, None].expand(GRID, GRID, -1), one[None].expand(GRID, GRID, -1)], 2).flatten(0, 1)


def build_processor() -> LlavaProcessor:
    """Word-level tokenizer that puts <bos> first, and an image processor that only standardises pixels."""
    words = Tokenizer(WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    pictures = CLIPImageProcessorPil(
        do_resize=False,
        size={"shortest_edge": CANVAS},
        do_center_crop=False,
        crop_size={"height": CANVAS, "width": CANVAS},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        image_token="<image>",
        num_additional_image_tokens=1,  # the tower's CLS token, which LLaVA drops
    )


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write weights in fp16 (safetensors) and the processor; ``model`` itself is left as it is."""
    half = {name: tensor.detach().half() for name, tensor in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=half)
    build_processor().save_pretrained(folder)


def load(folder: Path = CHECKPOINT) -> tuple[Any, Any]:
    """The saved model in fp32, in evaluation mode, and its processor."""
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def answers(model: Any, processor: Any, records: Sequence[HeldOut], batch: int = 25) -> list[str]:
    """Greedy ``generate()`` for every record, one question a prompt; returns the decoded texts."""
    out: list[str] = []
    for start in range(0, len(records), batch):
        some = records[start : start + batch]
        images, texts = [r.image for r in some], [f"<image> {r.question}" for r in some]
        inputs = processor(images=images, text=texts, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        out += processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return out
