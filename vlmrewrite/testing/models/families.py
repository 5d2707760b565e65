"""The seven families that all tests run through."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vlmrewrite.testing.models.tiny import (
    END,
    HIDDEN,
    IMAGE,
    START,
    TILE,
    VIDEO,
    TinyVLM,
    choice,
    decoder_sizes,
    patches,
    square,
    tiled,
    tiny_model,
    tower_sizes,
)


def llava(layers: int = 4, seed: int = 0) -> TinyVLM:
    """LLaVA 1.5: CLIP and Llama, 16 tokens an image."""
    return llava_of("llava", LlamaConfig(**decoder_sizes(layers)), seed)


def llava_qwen2(layers: int = 4, seed: int = 0) -> TinyVLM:
    """LLaVA with a Qwen2 decoder, whose q, k and v have biases."""
    return llava_of("llava_qwen2", Qwen2Config(**decoder_sizes(layers)), seed)


def llava_of(name: str, text: Any, seed: int) -> TinyVLM:
    """LLaVA with a decoder of this configuration."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower_sizes(image_size=16, projection_dim=HIDDEN)),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    return tiny_model(name, LlavaForConditionalGeneration, config, square(16, 16), seed)


def llava_next(layers: int = 4, seed: int = 0) -> TinyVLM:
    """LLaVA 1.6: CLIP and Llama, tiles of any resolution, 14 to 24 tokens an image."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**tower_sizes(image_size=8, projection_dim=HIDDEN)),
        text_config=LlamaConfig(**decoder_sizes(layers)),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[8, 16], [16, 8], [16, 16]],
        vision_feature_layer=-1,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(8, 16), (16, 8), (16, 16), (12, 16)]
        sizes = [options[choice(generator, len(options))] for _ in range(sum(counts))]
        tiles = [image_size_to_num_patches(s, config.image_grid_pinpoints, 8) for s in sizes]
        pixels = torch.zeros(len(sizes), max(tiles), 3, 8, 8)
        for image, n in zip(pixels, tiles, strict=True):
            image[:n] = torch.randn(n, 3, 8, 8, generator=generator)
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        base = tiny.model.base_model
        empty = [torch.zeros(n, 4, HIDDEN) for n in tiles]
        _, lengths = base.pack_image_features(empty, inputs["image_sizes"], "default", base.image_newline)
        return [[IMAGE] * n for n in lengths.tolist()], inputs

    tiny = tiny_model("llava_next", LlavaNextForConditionalGeneration, config, pictures, seed)
    return tiny


def qwen2_5_vl(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Qwen2.5-VL: images of any size, 4 to 12 tokens each, videos of 8 to 16 tokens, multimodal rope."""
    tower = tower_sizes(depth=2, num_heads=2, window_size=16, out_hidden_size=HIDDEN, fullatt_block_indexes=[1])
    del tower["num_hidden_layers"], tower["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    config = Qwen2_5_VLConfig(
        vision_config=tower,
        text_config=decoder_sizes(layers, rope_parameters=rope),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )

    def ids(token: int, grid: tuple[int, int, int]) -> list[int]:
        return [START, *[token] * (math.prod(grid) // 4), END]

    shape, names = [3 * 2 * 4 * 4], ("pixel_values_videos", "video_grid_thw")
    pictures = patches([(1, 4, 4), (1, 4, 8), (1, 6, 8), (1, 6, 4)], shape, functools.partial(ids, IMAGE))
    videos = patches([(2, 4, 4), (3, 4, 4), (2, 4, 8)], shape, functools.partial(ids, VIDEO), names)

    def clips(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        found, inputs = videos(counts, generator)
        return found, inputs | {"second_per_grid_ts": torch.ones(len(found))}

    video: dict[str, Any] = {"video_token_id": VIDEO, "clips": clips}
    kind = Qwen2_5_VLForConditionalGeneration
    return tiny_model("qwen2_5_vl", kind, config, pictures, seed, "mm_token_type_ids", **video)


def internvl(layers: int = 4, seed: int = 0) -> TinyVLM:
    """InternVL: one tile an image, or several and a thumbnail, 4 tokens a tile, one after the other."""
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**tower_sizes(image_size=[16, 16], patch_size=[4, 4])),
        text_config=Qwen2Config(**decoder_sizes(layers)),
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=False,
    )

    return tiny_model("internvl", InternVLForConditionalGeneration, config, tiled(16), seed)


def smolvlm(layers: int = 4, seed: int = 0) -> TinyVLM:
    """SmolVLM: one tile an image, or two and a thumbnail, 4 tokens a tile, each behind a marker."""
    config = SmolVLMConfig(
        vision_config=tower_sizes(image_size=16),
        text_config=LlamaConfig(**decoder_sizes(layers)),
        image_token_id=IMAGE,
        scale_factor=2,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        tiles = [[(1, 3)[choice(generator, 2)] for _ in range(n)] for n in counts]
        pixels = torch.zeros(len(counts), max(map(sum, tiles)), 3, 16, 16)
        mask = torch.zeros(pixels.shape[0], pixels.shape[1], 16, 16, dtype=torch.int64)
        for i, n in enumerate(map(sum, tiles)):
            pixels[i, :n], mask[i, :n] = torch.randn(n, 3, 16, 16, generator=generator), 1
        ids = [[START, TILE, *[IMAGE] * 4] * n + [START] for row in tiles for n in row]
        return ids, {"pixel_values": pixels, "pixel_attention_mask": mask}

    return tiny_model("smolvlm", SmolVLMForConditionalGeneration, config, pictures, seed)


def gemma3(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Gemma 3: 9 tokens an image that see one another; every other layer has a sliding window of 8 tokens."""
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(layers)]
    text = decoder_sizes(layers, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=kinds)
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**tower_sizes(image_size=24, vision_use_head=False)),
        text_config=Gemma3TextConfig(**text),
        mm_tokens_per_image=9,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,  # tied to large random embeddings, the next token would be the last one again
    )
    pictures = square(24, 9, marked=True)
    return tiny_model("gemma3", Gemma3ForConditionalGeneration, config, pictures, seed, "token_type_ids")
