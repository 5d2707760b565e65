"""Tiny models of several families, saved with a processor, as an engine loads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    Gemma3TextConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from vlmrewrite.testing.models.tiny import TinyVLM, square, tiny_model

IMAGE, VIDEO, START, END, WORDS = 4, 5, 2, 3, 120
HIDDEN, HEAD = 64, 32  # an engine's kernels know no smaller heads

Saved = tuple[Any, Any, str]
"""A model, its processor, and what stands for an image in a prompt."""


def tokenizer(**names: str) -> PreTrainedTokenizerFast:
    """Words w10 to w119, and special tokens of these names."""
    special = {"<pad>": 0, "<unk>": 1, names["start"]: START, names["end"]: END, names["image"]: IMAGE}
    special |= {names["video"]: VIDEO} | {"\n" * n: 5 + n for n in range(1, 5)}
    words = {f"w{i}": i for i in range(10, WORDS)}
    made = Tokenizer(WordLevel(words | special, "<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    made.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens={k: v for k, v in names.items() if k.endswith("_token")},
    )


def text(**more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": WORDS, "hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    return {**sizes, **heads, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None, **more}


def tower(**more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 2 * HIDDEN, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {**sizes, "patch_size": 4, **more}


def model_of(kind: Any, config: Any, seed: int) -> Any:
    """A model with random weights that generates any token."""
    made: TinyVLM = tiny_model("served", kind, config, square(16, 4), seed, image_token_id=IMAGE)
    made.model.generation_config.suppress_tokens = None
    return made.model


def qwen2_5_vl(seed: int = 0) -> Saved:
    """Images of any size, M-RoPE."""
    names = {"start": "<|vision_start|>", "end": "<|vision_end|>", "image": "<|image_pad|>", "video": "<|video_pad|>"}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    see = tower(depth=2, num_heads=2, window_size=16, out_hidden_size=HIDDEN, fullatt_block_indexes=[1])
    del see["num_hidden_layers"], see["num_attention_heads"]
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    config = Qwen2_5_VLConfig(vision_config=see, text_config=text(rope_parameters=rope), **ids)
    size: dict[str, Any] = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 4096}}
    processor = Qwen2_5_VLProcessor(Qwen2VLImageProcessorPil(**size), tokenizer(**names), Qwen2VLVideoProcessor(**size))
    return (
        model_of(Qwen2_5_VLForConditionalGeneration, config, seed),
        processor,
        "<|vision_start|><|image_pad|><|vision_end|>",
    )


def internvl(seed: int = 0) -> Saved:
    """Tiles of 16 tokens, one behind the other."""
    names = {"start": "<img>", "end": "</img>", "image": "<IMG_CONTEXT>", "video": "<video>"}
    names |= {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**tower(image_size=[32, 32], patch_size=[4, 4])),
        text_config=Qwen2Config(**text()),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    pictures = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, max_patches=4)
    videos = InternVLVideoProcessor(size={"height": 32, "width": 32})
    processor = InternVLProcessor(pictures, tokenizer(**names, video_token="<video>"), videos, image_seq_length=16)
    return model_of(InternVLForConditionalGeneration, config, seed), processor, "<IMG_CONTEXT>"


def gemma3(seed: int = 0) -> Saved:
    """16 tokens an image that see one another."""
    names = {"start": "<start_of_image>", "end": "<end_of_image>", "image": "<image_soft_token>", "video": "<video>"}
    names |= {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(4)]
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**tower(image_size=32, vision_use_head=False)),
        text_config=Gemma3TextConfig(
            **text(head_dim=HEAD, query_pre_attn_scalar=HEAD, sliding_window=256, layer_types=kinds)
        ),
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    pictures = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = Gemma3Processor(pictures, tokenizer(**names), image_seq_length=16)
    return model_of(Gemma3ForConditionalGeneration, config, seed), processor, "<start_of_image>"


def llava_onevision(seed: int = 0) -> Saved:
    """An image alone is cut into tiles, with a feature at the end of each row of them."""
    names = {"start": "<start>", "end": "<end>", "image": "<image>", "video": "<video>"}
    pinpoints = [[16, 16], [16, 32], [32, 16], [32, 32]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**tower(image_size=16, vision_use_head=False)),
        text_config=Qwen2Config(**text()),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_9",
    )
    size = {"height": 16, "width": 16}
    pictures = LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pinpoints)
    videos = LlavaOnevisionVideoProcessor(size=size)
    words = tokenizer(**names, image_token="<image>", video_token="<video>")
    options: dict[str, Any] = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
    processor = LlavaOnevisionProcessor(pictures, words, videos, vision_aspect_ratio="anyres_max_9", **options)
    return model_of(LlavaOnevisionForConditionalGeneration, config, seed), processor, "<image>"


FAMILIES: dict[str, Callable[[], Saved]] = {f.__name__: f for f in (qwen2_5_vl, internvl, gemma3, llava_onevision)}


def saved(name: str, folder: Path, *, engine: bool = True) -> Saved:
    """A tiny model, written with its processor into a folder; with the names of weights of an engine's own class.

    The processor is the one that an engine finds there: with torchvision it makes pictures smaller by other arithmetic
    than Pillow's, by which features differ far more than by rounding.
    """
    model, processor, image = FAMILIES[name]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    file, tower = folder / "model.safetensors", "vision_tower."
    weights = load_file(file)
    if engine and hasattr(
        model.config.vision_config, "vision_use_head"
    ):  # older files have one more part in these names
        weights = {k.replace(tower, f"{tower}vision_model."): v for k, v in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})
    return model, processor, image
