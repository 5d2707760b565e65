"""The model that reads: an unmodified Hugging Face LLaVA, and its processor.

Swin tower (one stage of 4 layers x 128, patch 14, windows of 12x12: 576 tokens of a page of 336x336) -> projector ->
Llama (6 layers x 128, tied embeddings). A prompt is "<image> " and four words.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor, SwinConfig

from .. import model as digits
from ..model import HEADS, INIT_STD, MLP, WIDTH, alike
from .pages import CANVAS, GRID, MEAN, PATCH, STD, VISION_TOKENS
from .questions import VOCABULARY

TOWER_LAYERS, DECODER_LAYERS, WINDOW = 4, 6, 12
CHECKPOINT = Path(__file__).parent / "checkpoint"


def build_model() -> Any:
    """A freshly initialised model; queries and keys start alike, and the tower's positions as waves of both axes."""
    vision = SwinConfig(
        embed_dim=WIDTH,
        depths=[TOWER_LAYERS],
        num_heads=[HEADS],
        window_size=WINDOW,
        mlp_ratio=MLP / WIDTH,
        image_size=CANVAS,
        patch_size=PATCH,
        initializer_range=INIT_STD,
        use_absolute_embeddings=True,
        drop_path_rate=0.0,
    )
    text = digits.text_config(len(VOCABULARY), DECODER_LAYERS, positions=1024)
    model: Any = LlavaForConditionalGeneration(digits.llava_config(vision, text, VISION_TOKENS, strategy="full"))
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            alike(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
        tower = model.model.vision_tower
        tower.embeddings.position_embeddings[0] = waves()
        for name, weight in tower.named_parameters():
            if name.endswith("q_proj.weight"):
                alike(weight, tower.get_parameter(name.replace("q_proj", "k_proj")))
            if name.endswith("bias_table"):  # [rows apart x columns apart, heads]: lines begin apart
                rows = (torch.arange(2 * WINDOW - 1) - WINDOW + 1).abs()
                weight.copy_((-4.0 * (rows - 1).clamp(min=0)).repeat_interleave(len(rows))[:, None].expand_as(weight))
    digits.greedy(model)
    return model


def waves() -> torch.Tensor:
    """Sines and cosines of row and column, [576, 128]."""
    rates = 1.5 * 0.8 ** torch.arange(WIDTH // 4) * math.pi / 3
    angles = torch.arange(GRID)[:, None] * rates
    one = 0.5 * torch.cat([angles.sin(), angles.cos()], 1)  # [24, 64]
    return torch.cat([one[:, None].expand(GRID, GRID, -1), one[None].expand(GRID, GRID, -1)], 2).flatten(0, 1)


def build_processor() -> LlavaProcessor:
    """The digits' with the words, sizes and pixels of the pages."""
    return digits.build_processor(VOCABULARY, CANVAS, PATCH, MEAN, STD, strategy="full")


def save(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write weights in fp16 (safetensors) and the processor; ``model`` itself is left as it is."""
    digits.save(model, folder, build_processor())


def load(folder: Path = CHECKPOINT) -> tuple[Any, Any]:
    """The saved model in fp32, in evaluation mode, and its processor."""
    return digits.load(folder)
