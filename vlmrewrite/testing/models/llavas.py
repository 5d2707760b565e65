"""Relatives of LLaVA: a plain tower, a projector, image tokens in the stream of a plain decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from vlmrewrite.testing.models.tiny import (
    HIDDEN,
    IMAGE,
    VIDEO,
    Pictures,
    TinyVLM,
    choice,
    decoder_sizes,
    square,
    tiny_model,
    tower_sizes,
)

FRAMES = 2
"""How many each video has."""


def vipllava(layers: int = 4, seed: int = 0) -> TinyVLM:
    """ViP-LLaVA: features of several layers of CLIP side by side, a norm before the projector, 16 tokens an image."""
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**tower_sizes(image_size=16, projection_dim=HIDDEN, num_hidden_layers=3)),
        text_config=LlamaConfig(**decoder_sizes(layers)),
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=[-1, -2, 1],
    )
    return tiny_model("vipllava", VipLlavaForConditionalGeneration, config, square(16, 16), seed)


def video_llava(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Video-LLaVA: a tower for images, 4 tokens each, and one for videos, whose frames keep the class token: 5 each."""
    config = VideoLlavaConfig(
        vision_config=CLIPVisionConfig(**tower_sizes(image_size=8, projection_dim=HIDDEN)),
        text_config=LlamaConfig(**decoder_sizes(layers)),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
        image_seq_length=4,
        video_seq_length=5 * FRAMES,
    )
    videos: dict[str, Any] = {"video_token_id": VIDEO, "clips": frames(8, 5 * FRAMES)}
    return tiny_model("video_llava", VideoLlavaForConditionalGeneration, config, square(8, 4), seed, **videos)


def llava_next_video(layers: int = 4, seed: int = 0) -> TinyVLM:
    """LLaVA-NeXT-Video: tiles of any resolution, 14 to 24 tokens an image; frames of 4 tokens, pooled to 1 each."""
    pinpoints = [[8, 16], [16, 8], [16, 16]]
    config = LlavaNextVideoConfig(
        vision_config=CLIPVisionConfig(**tower_sizes(image_size=8, projection_dim=HIDDEN)),
        text_config=LlamaConfig(**decoder_sizes(layers)),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )

    def lengths(empty: list[Tensor], sizes: Tensor) -> list[int]:
        base = tiny.model.base_model
        return [len(x) for x in base.pack_image_features(empty, sizes, "default", base.image_newline)[0]]

    pictures = tiled(pinpoints, lengths)
    videos: dict[str, Any] = {"video_token_id": VIDEO, "clips": frames(8, FRAMES)}
    kind = LlavaNextVideoForConditionalGeneration
    tiny = tiny_model("llava_next_video", kind, config, pictures, seed, **videos)
    return tiny


def llava_onevision(layers: int = 4, seed: int = 0) -> TinyVLM:
    """LLaVA-OneVision: an image alone in its row is cut into tiles, 10 to 24 tokens; several get 5 each, videos 3."""
    pinpoints = [[8, 8], [8, 16], [16, 8], [16, 16]]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**tower_sizes(image_size=8, vision_use_head=False)),
        text_config=Qwen2Config(**decoder_sizes(layers)),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
    )

    def lengths(empty: list[Tensor], sizes: Tensor) -> list[int]:
        base = tiny.model.base_model
        return [len(x) for x in base.pack_image_features(empty, sizes, base.image_newline, "anyres_max_2")[0]]

    whole = tiled(pinpoints, lengths, alone=True)

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        ids, inputs = whole(counts, generator)
        return ids, inputs | {"batch_num_images": torch.tensor(counts)}

    videos: dict[str, Any] = {"video_token_id": VIDEO, "clips": frames(8, FRAMES + 1)}
    kind = LlavaOnevisionForConditionalGeneration
    tiny = tiny_model("llava_onevision", kind, config, pictures, seed, **videos)
    return tiny


def tiled(
    pinpoints: list[list[int]],
    lengths: Callable[[list[Tensor], Tensor], list[int]],
    *,
    side: int = 8,
    alone: bool = False,
) -> Pictures:
    """Images of several sizes, as a small picture of each and tiles of it, with 4 tokens a tile.

    Args:
        pinpoints: the sizes in pixels, height and width, that tiles cover.
        lengths: the numbers of tokens of images, of features [tiles, 4, H] and sizes.
        side: of a tile, in pixels.
        alone: only an image that is alone in its row has tiles.
    """

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(side, 2 * side), (2 * side, side), (2 * side, 2 * side), (side + side // 2, 2 * side)]
        sizes = [options[choice(generator, len(options))] for _ in range(sum(counts))]
        cut = [not alone or n == 1 for n in counts for _ in range(n)]
        tiles = [image_size_to_num_patches(s, pinpoints, side) if c else 1 for s, c in zip(sizes, cut, strict=True)]
        pixels = torch.zeros(len(sizes), max(tiles), 3, side, side)
        for image, n in zip(pixels, tiles, strict=True):
            image[:n] = torch.randn(n, 3, side, side, generator=generator)
        inputs = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        tokens = lengths([torch.zeros(n, 4, HIDDEN) for n in tiles], inputs["image_sizes"])
        return [[IMAGE] * n for n in tokens], inputs

    return pictures


def frames(size: int, tokens: int) -> Pictures:
    """Videos of two frames that all have one size and one number of tokens."""

    def clips(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        pixels = torch.randn(sum(counts), FRAMES, 3, size, size, generator=generator)
        return [[VIDEO] * tokens] * len(pixels), {"pixel_values_videos": pixels}

    return clips
