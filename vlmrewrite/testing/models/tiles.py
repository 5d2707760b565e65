"""Families that cut an image into tiles of one size, and write markers between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    Cohere2Config,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Lfm2Config,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    LlamaConfig,
    MistralConfig,
    SiglipVisionConfig,
)

from vlmrewrite.testing.models.tiny import (
    END,
    HIDDEN,
    IMAGE,
    START,
    TILE,
    Pictures,
    TinyVLM,
    choice,
    decoder_sizes,
    tiny_model,
    tower_sizes,
)

WHOLE = 7
"""The token in front of the picture of the whole image, where tiles have another."""

LINE = 1
"""The token at the end of a row of tiles."""


def grids_of_tiles(size: int, ids: Callable[[int, int], list[int]]) -> Pictures:
    """Images of 1, 2 or 4 tiles, and one of the whole behind several tiles.

    Args:
        size: of a tile, in pixels.
        ids: the token ids of an image of so many rows and columns of tiles.
    """

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(1, 1), (1, 2), (2, 1), (2, 2)]
        grids = [options[choice(generator, len(options))] for _ in range(sum(counts))]
        tiles = sum(_tiles(h, w) for h, w in grids)
        return [ids(h, w) for h, w in grids], {"pixel_values": torch.randn(tiles, 3, size, size, generator=generator)}

    return pictures


def _tiles(h: int, w: int) -> int:
    return h * w + (h * w > 1)


def padded(flat: Pictures, size: int, tokens: int) -> Pictures:
    """The same tiles in one tensor [rows, tiles, 3, size, size] with a mask, filled up with zeros."""

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        ids, inputs = flat(counts, generator)
        images, tiles = iter(ids), iter(inputs["pixel_values"])
        rows = [sum(next(images).count(IMAGE) // tokens for _ in range(n)) for n in counts]
        pixels = torch.zeros(len(rows), max(rows), 3, size, size)
        mask = torch.zeros(len(rows), max(rows), size, size, dtype=torch.int64)
        for i, n in enumerate(rows):
            for j in range(n):
                pixels[i, j], mask[i, j] = next(tiles), 1
        return ids, {"pixel_values": pixels, "pixel_attention_mask": mask}

    return pictures


def aya_vision(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Aya Vision: a marker before each tile of 4 tokens; attention beside the MLP, in windows of 8 or without rope."""
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**tower_sizes(image_size=16, vision_use_head=False)),
        text_config=_cohere2(layers),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )

    def ids(h: int, w: int) -> list[int]:
        several = h * w > 1
        return [START, *[TILE, *[IMAGE] * 4] * (h * w * several), WHOLE, *[IMAGE] * 4, END]

    return tiny_model("aya_vision", AyaVisionForConditionalGeneration, config, grids_of_tiles(16, ids), seed)


def cohere2_vision(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Command A Vision: a line break behind each tile of 4 tokens; the decoder of Aya Vision."""
    config = Cohere2VisionConfig(
        vision_config=SiglipVisionConfig(**tower_sizes(image_size=16, vision_use_head=False)),
        text_config=_cohere2(layers),
        image_token_id=IMAGE,
        alignment_intermediate_size=2 * HIDDEN,
        tie_word_embeddings=False,
    )

    def ids(h: int, w: int) -> list[int]:
        return [START, *[*[IMAGE] * 4, LINE] * _tiles(h, w), END]

    return tiny_model("cohere2_vision", Cohere2VisionForConditionalGeneration, config, grids_of_tiles(16, ids), seed)


def _cohere2(layers: int) -> Cohere2Config:
    return Cohere2Config(**decoder_sizes(layers, logit_scale=1.0, sliding_window=8, tie_word_embeddings=False))


def llama4(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Llama 4: separators between tiles of 4 tokens; experts, chunks of 8 tokens, one layer with growing q."""
    tower = tower_sizes(image_size=16, intermediate_size=4 * HIDDEN, vision_output_dim=HIDDEN)
    text = decoder_sizes(
        layers,
        head_dim=8,
        intermediate_size_mlp=2 * HIDDEN,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
        floor_scale=8,
        attn_scale=0.5,
    )
    config = Llama4Config(
        vision_config={**tower, "projector_input_dim": HIDDEN, "projector_output_dim": HIDDEN},
        text_config=text,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )

    def ids(h: int, w: int) -> list[int]:
        row = [IMAGE] * 4 + [TILE, *[IMAGE] * 4] * (w - 1) + [LINE]
        return [START, *row * (h * (h * w > 1)), WHOLE, *[IMAGE] * 4, END]

    return tiny_model("llama4", Llama4ForConditionalGeneration, config, grids_of_tiles(16, ids), seed)


def idefics3(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Idefics3: rows of tiles of 4 tokens, each behind two markers, and a line break behind each row; Llama."""
    config = Idefics3Config(
        vision_config=tower_sizes(image_size=16),
        text_config=LlamaConfig(**decoder_sizes(layers)),
        image_token_id=IMAGE,
        scale_factor=2,
    )

    def ids(h: int, w: int) -> list[int]:
        rows = [*[START, TILE, *[IMAGE] * 4] * w, LINE] * h + [LINE]
        return rows * (h * w > 1) + [START, WHOLE, *[IMAGE] * 4, START]

    pictures = padded(grids_of_tiles(16, ids), 16, 4)
    return tiny_model("idefics3", Idefics3ForConditionalGeneration, config, pictures, seed)


def idefics2(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Idefics2: four crops and the whole image, of any size, 2 tokens of a resampler each; windows of 8 tokens."""
    resampler = {"resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 16}
    config = Idefics2Config(
        vision_config=tower_sizes(image_size=16),
        perceiver_config={**resampler, "hidden_size": HIDDEN, "num_key_value_heads": 1},
        text_config=MistralConfig(**decoder_sizes(layers, sliding_window=8)),
        image_token_id=IMAGE,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        options = [(16, 16), (8, 16), (16, 8)]
        sizes = [[options[choice(generator, len(options))] for _ in range(n)] for n in counts]
        pixels = torch.zeros(len(counts), 5 * max(counts), 3, 16, 16)
        mask = torch.zeros(len(counts), 5 * max(counts), 16, 16, dtype=torch.int64)
        for i, row in enumerate(sizes):
            crops = [size for h, w in row for size in [(h // 2, w // 2)] * 4 + [(h, w)]]
            for j, (h, w) in enumerate(crops):
                pixels[i, j, :, :h, :w], mask[i, j, :h, :w] = torch.randn(3, h, w, generator=generator), 1
        ids = [[START, *[IMAGE, IMAGE, START] * 5]] * sum(counts)
        return ids, {"pixel_values": pixels, "pixel_attention_mask": mask}

    return tiny_model("idefics2", Idefics2ForConditionalGeneration, config, pictures, seed)


def lfm2_vl(layers: int = 4, seed: int = 0) -> TinyVLM:
    """LFM2-VL: tiles of 4 tokens behind markers, or an image of its own shape; convolutions and attention in turn."""
    kinds = [("conv", "full_attention")[i % 2] for i in range(layers)]
    text = decoder_sizes(layers, layer_types=kinds, block_multiple_of=8, tie_word_embeddings=False)
    config = Lfm2VlConfig(
        vision_config={"model_type": "siglip2_vision_model", **tower_sizes(vision_use_head=False, num_patches=16)},
        text_config=Lfm2Config(**text),
        image_token_id=IMAGE,
        projector_hidden_size=HIDDEN,
        tie_word_embeddings=False,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        grids = [[(1, 1), (1, 2), (2, 2)][choice(generator, 3)] for _ in range(sum(counts))]
        wholes = [[(2, 4), (4, 4), (4, 2), (2, 6)][choice(generator, 4)] for _ in grids]
        ids, shapes = [], []
        for (h, w), (rows, columns) in zip(grids, wholes, strict=True):
            whole, tiles = [IMAGE] * (rows * columns // 4), h * w if h * w > 1 else 0
            ids.append([START, *[TILE, *[IMAGE] * 4] * tiles, *[WHOLE] * (tiles > 0), *whole, END])
            shapes += [(4, 4)] * tiles + [(rows, columns)]
        pixels = torch.zeros(len(shapes), 16, 3 * 4 * 4)
        mask = torch.zeros(len(shapes), 16, dtype=torch.int64)
        for i, (h, w) in enumerate(shapes):
            pixels[i, : h * w], mask[i, : h * w] = torch.randn(h * w, 3 * 4 * 4, generator=generator), 1
        inputs = {"pixel_values": pixels, "pixel_attention_mask": mask}
        return ids, inputs | {"spatial_shapes": torch.tensor(shapes)}

    return tiny_model("lfm2_vl", Lfm2VlForConditionalGeneration, config, pictures, seed)
