"""Families that read pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DeepseekOcr2Config,
    DeepseekOcr2ForConditionalGeneration,
    GotOcr2ForConditionalGeneration,
    PPChart2TableConfig,
    QianfanOCRConfig,
    QianfanOCRForConditionalGeneration,
    Qwen2Config,
    Qwen3Config,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
)

from vlmrewrite.testing.models.tiny import (
    END,
    HIDDEN,
    IMAGE,
    START,
    TinyVLM,
    choice,
    decoder_sizes,
    square,
    tiny_model,
    tower_sizes,
)


def pp_chart2table(layers: int = 4, seed: int = 0) -> TinyVLM:
    """PP-Chart2Table: GOT-OCR 2.0 with a configuration of its own; windows in the tower, 16 tokens an image."""
    config = PPChart2TableConfig(
        vision_config=_windows(image_size=64, mlp_dim=2 * HIDDEN),
        text_config=Qwen2Config(**decoder_sizes(layers)),
        image_token_index=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    pictures = square(64, 16, marked=True)
    return tiny_model("pp_chart2table", GotOcr2ForConditionalGeneration, config, pictures, seed)


def qianfan_ocr(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Qianfan-OCR: one tile an image, or several and a thumbnail, 4 tokens a tile; norms of queries and keys."""
    config = QianfanOCRConfig(
        vision_config=tower_sizes(image_size=[16, 16], patch_size=[4, 4]),
        text_config=Qwen3Config(**decoder_sizes(layers, head_dim=8)),
        image_token_id=IMAGE,
        image_seq_length=4,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        tiles = [(1, 3)[choice(generator, 2)] for _ in range(sum(counts))]
        ids = [[START, *[IMAGE] * (4 * n), END] for n in tiles]
        return ids, {"pixel_values": torch.randn(sum(tiles), 3, 16, 16, generator=generator)}

    return tiny_model("qianfan_ocr", QianfanOCRForConditionalGeneration, config, pictures, seed)


def deepseek_ocr2(layers: int = 4, seed: int = 0) -> TinyVLM:
    """DeepSeek-OCR 2: 144 queries a view, whatever its size; experts beside shared ones behind the first layer.

    An image is a view of the whole, with 2 or 3 crops in front if it is large, and a separator: 145 to 577 tokens.
    """
    encoder = decoder_sizes(2)
    del encoder["vocab_size"]
    config = DeepseekOcr2Config(
        vision_config={
            "sam_config": _windows(image_size=192, downsample_channels=[HIDDEN, HIDDEN], mlp_dim=2 * HIDDEN)
            | {"global_attn_indexes": []},
            "encoder_config": encoder,
        },
        text_config=_experts(layers),
        image_token_id=IMAGE,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Tensor]]:
        crops = [(0, 2, 3)[choice(generator, 3)] for _ in range(sum(counts))]
        inputs = {"pixel_values": torch.randn(len(crops), 3, 192, 192, generator=generator)}
        if any(crops):
            inputs["pixel_values_local"] = torch.randn(sum(crops), 3, 192, 192, generator=generator)
        inputs["num_local_patches"] = torch.tensor(crops)
        return [[IMAGE] * (144 * (n + 1) + 1) for n in crops], inputs

    return tiny_model("deepseek_ocr2", DeepseekOcr2ForConditionalGeneration, config, pictures, seed)


def unlimited_ocr(layers: int = 4, seed: int = 0) -> TinyVLM:
    """Unlimited-OCR: new tokens attend to the whole prompt, and to no more than the last 8 new ones; experts.

    An image is a view of the whole, 4 × 4 tokens, with up to 3 crops of 2 × 2 in front if it is large; a token ends
    each row and one the image: 21 to 35. Numbers and grids of crops are lists, not tensors.
    """
    config = UnlimitedOcrConfig(
        vision_config={
            "sam_config": _windows(image_size=64, downsample_channels=[HIDDEN, HIDDEN], mlp_dim=2 * HIDDEN),
            "encoder_config": tower_sizes(image_size=16),
        },
        text_config=_experts(layers, sliding_window=8),
        image_token_id=IMAGE,
    )

    def pictures(counts: Sequence[int], generator: torch.Generator) -> tuple[list[list[int]], dict[str, Any]]:
        options = [(1, 1), (2, 1), (1, 2), (3, 1)]
        grids = [list(options[choice(generator, len(options))]) for _ in range(sum(counts))]
        crops = [w * h if w * h > 1 else 0 for w, h in grids]
        inputs: dict[str, Any] = {"pixel_values": torch.randn(len(grids), 3, 64, 64, generator=generator)}
        if any(crops):
            inputs["pixel_values_local"] = torch.randn(sum(crops), 3, 32, 32, generator=generator)
        inputs |= {"num_local_patches": crops, "patches_grid": grids}
        lengths = [4 * 5 + 1 + (2 * h * (2 * w + 1) if w * h > 1 else 0) for w, h in grids]
        return [[IMAGE] * n for n in lengths], inputs

    return tiny_model("unlimited_ocr", UnlimitedOcrForConditionalGeneration, config, pictures, seed)


def _windows(**more: Any) -> dict[str, Any]:
    """A tower of two layers: windows of 4 × 4 patches, then all of the image."""
    sizes = {"output_channels": HIDDEN, "window_size": 4, "global_attn_indexes": [1]}
    return tower_sizes(**sizes, **more) | {"num_hidden_layers": 2}


def _experts(layers: int, **more: Any) -> dict[str, Any]:
    """A decoder with four experts in all layers but the first."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": HIDDEN}
    kinds = ["sparse" if i else "dense" for i in range(layers)]
    return decoder_sizes(layers, mlp_layer_types=kinds, **experts, **more) | {"max_position_embeddings": 4096}
